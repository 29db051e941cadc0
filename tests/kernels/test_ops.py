"""The differentiable forms against the reference and against autograd, fp64 where it decides."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_router_kernels import combine, gather, grouped_mm, reference
from tests.strategies import targets

few = settings(max_examples=25, deadline=None)


@few
@given(targets(max_tokens=8, max_groups=4), st.integers(1, 3))
def test_gather_and_combine_gradients_are_those_of_the_reference(routing, dim):
    target_TK, groups = routing
    src_R, choice_R, _, row_TK = reference.plan(target_TK, groups)
    live_R1 = (src_R >= 0)[:, None]

    def layer(move_in, move_out):
        torch.manual_seed(0)
        x_TD = torch.randn(len(target_TK), dim, dtype=torch.float64, requires_grad=True)
        weight_TK = torch.rand(target_TK.shape, dtype=torch.float64, requires_grad=True)
        rows_RD = torch.where(live_R1, move_in(x_TD), 0.0)
        out_TD = move_out(rows_RD**2, weight_TK)
        return out_TD, torch.autograd.grad(out_TD.square().sum(), (x_TD, weight_TK))

    ours = layer(
        lambda x: gather(x, src_R, row_TK),
        lambda y, w: combine(y, w, src_R, choice_R, row_TK),
    )
    specified = layer(
        lambda x: reference.gather(x, src_R), lambda y, w: reference.combine(y, w, row_TK)
    )
    torch.testing.assert_close(ours, specified)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rows", [[3, 0, 5], [0, 0, 0], [0, 8, 0], [1, 1, 1]])
@pytest.mark.parametrize("dim, hidden", [(16, 32), (7, 13)])
def test_grouped_mm_equals_a_product_per_group(dtype, rows, dim, hidden):
    torch.manual_seed(0)
    offsets_G1 = torch.tensor([0, *torch.tensor(rows).cumsum(0)], dtype=torch.int32)
    x_RD = torch.randn(9, dim, dtype=dtype, requires_grad=True)  # rows past the end
    w_GDF = torch.randn(3, dim, hidden, dtype=dtype, requires_grad=True)
    live = int(offsets_G1[-1])
    loss = torch.randn(live, hidden, dtype=dtype)
    ours = grouped_mm(x_RD, w_GDF, offsets_G1)[:live]
    wanted = reference.grouped_mm(x_RD, w_GDF, offsets_G1)[:live]
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(ours, wanted, **tolerance)
    grads = torch.autograd.grad((ours * loss).sum(), (x_RD, w_GDF))
    wanted_grads = torch.autograd.grad((wanted * loss).sum(), (x_RD, w_GDF))
    torch.testing.assert_close(grads[0][:live], wanted_grads[0][:live], **tolerance)
    torch.testing.assert_close(grads[1], wanted_grads[1], **tolerance)
