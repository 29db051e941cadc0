"""`launch`: a compiled kernel is used again for arguments that Triton specialises alike."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

triton = pytest.importorskip("triton")

from triton._C.libtriton import native_specialize_impl  # noqa: E402
from triton.backends.nvidia.compiler import CUDABackend  # noqa: E402

from moe_router_kernels.launch import trait  # noqa: E402

near = [0, 1, 2, 15, 16, 2**31 - 16, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**63 + 1]
integers = st.sampled_from([*near, *(-n for n in near if n <= 2**63)])
tensors = st.builds(
    lambda dtype, first: torch.zeros(64, dtype=dtype)[first:],
    st.sampled_from([torch.bfloat16, torch.float32, torch.int32, torch.int64, torch.bool]),
    st.integers(0, 16),
)
arguments = st.one_of(integers, tensors, st.booleans(), st.none(), st.floats(width=32))


def specialised(arg: Any) -> Any:
    return native_specialize_impl(CUDABackend, arg, False, True, True)


@given(arguments, arguments)
def test_what_triton_tells_apart_has_different_traits(one: Any, other: Any) -> None:
    if specialised(one) != specialised(other):
        assert trait(one) != trait(other)


def test_sizes_do_not_make_new_traits() -> None:
    assert trait(48) == trait(4096) != trait(47) == trait(4095) != trait(1)
    rows = torch.zeros(64, 8)
    assert trait(rows) == trait(rows[2:]) != trait(rows.flatten()[1:])


@pytest.mark.gpu
def test_a_kernel_is_launched_again_where_it_may_be() -> None:
    from moe_router_kernels import launch
    from moe_router_kernels.permute import combine_rows

    known = launch._compiled
    row_TK = torch.randint(0, 40, (24, 2), device="cuda", dtype=torch.int32)
    made = []
    for first in (0, 0, 8, 1):  # elements of two bytes: aligned to 16 bytes, or not
        values = torch.arange(40 * 64 + first, device="cuda").bfloat16()[first:] * 0.01
        y_RD = torch.empty(40 * 64 + first, device="cuda").bfloat16()[first:].view(40, 64)
        y_RD.copy_(values.view(40, 64))
        wanted_TD = y_RD.float()[row_TK.long()].sum(1).bfloat16()
        assert torch.equal(combine_rows(y_RD, row_TK), wanted_TD)
        made.append(len(known))
    assert made[0] == made[1] == made[2] == made[3] - 1
