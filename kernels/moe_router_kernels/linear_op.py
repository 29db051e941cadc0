"""Linear layers without bias of one token: Triton on a GPU, in one launch for those that read the
same token, else torch's. Without gradients."""

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_router_kernels import reference
from moe_router_kernels.choose import uses_triton
from moe_router_kernels.operation import operation


def linears(
    x_TK: Tensor,
    weights: Sequence[Tensor],
    *,
    dtype: torch.dtype | None = None,
    kernels: str = "auto",
) -> list[Tensor]:
    """Several linear layers of the same tokens.

    Args:
        x_TK: 16 bit, or fp32.
        weights: (N, K) each, contiguous, of x's dtype; three at most.
        dtype: of what comes out; x's if None.
        kernels: see `choose.uses_triton`; the kernel is of one token alone.

    Returns:
        (T, N) of each weight. One token's sums have another order than those of more.
    """
    dtype = dtype or x_TK.dtype
    uncovered = "fp64" if x_TK.dtype.itemsize == 8 else ""
    if x_TK.size(0) == 1 and uses_triton("linear of one token", kernels, x_TK.device, uncovered):
        given = (*weights, None, None)[:3]
        out_1N = _of_one(x_TK.contiguous(), *given, dtype)
        return list(torch.split(out_1N, [w.size(0) for w in weights], 1))
    return reference.linears(x_TK, weights, dtype)


@operation("moe_router::linears_of_one")
def _of_one(
    x_1K: Tensor, a_NK: Tensor, b_NK: Tensor | None, c_NK: Tensor | None, dtype: torch.dtype
) -> Tensor:
    from moe_router_kernels import vector_linear

    return vector_linear.linears(x_1K, [w for w in (a_NK, b_NK, c_NK) if w is not None], dtype)


@_of_one.register_fake
def _(
    x_1K: Tensor, a_NK: Tensor, b_NK: Tensor | None, c_NK: Tensor | None, dtype: torch.dtype
) -> Tensor:
    outputs = sum(w.size(0) for w in (a_NK, b_NK, c_NK) if w is not None)
    return x_1K.new_empty(1, outputs, dtype=dtype)
