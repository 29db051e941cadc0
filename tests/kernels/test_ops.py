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


@few
@given(targets(max_tokens=12, max_groups=5), st.integers(1, 9), st.booleans())
def test_fp32_on_a_cpu_takes_the_same_sums_in_one_pass(routing, dim, trimmed):
    target_TK, groups = routing
    src_R, choice_R, offsets_G1, row_TK = reference.plan(target_TK, groups)
    used = int(offsets_G1[-1])
    end = used if trimmed else len(src_R)
    src_R, choice_R = src_R[:end], choice_R[:end]
    torch.manual_seed(0)
    y_RD = torch.randn(end, dim)
    y_RD[used:] = float("nan")  # nobody wrote these
    y_RD.requires_grad_()
    weight_TK = torch.rand(target_TK.shape, requires_grad=True)
    x_TD = torch.randn(len(target_TK), dim, requires_grad=True)
    out_TD = combine(y_RD, weight_TK, src_R, choice_R, row_TK)
    torch.testing.assert_close(out_TD, reference.combine(y_RD, weight_TK, row_TK))
    grad_TD = torch.randn(out_TD.shape)
    grad_RD, grad_TK = torch.autograd.grad(out_TD, (y_RD, weight_TK), grad_TD)
    wanted = reference.combine_backward(grad_TD, y_RD, weight_TK, src_R, choice_R, row_TK)
    torch.testing.assert_close((grad_RD[:used], grad_TK), (wanted[0][:used], wanted[1]))
    rows_RD = gather(x_TD, src_R, row_TK)
    grad_rows_RD = torch.randn(rows_RD.shape)
    (grad_x_TD,) = torch.autograd.grad(rows_RD, x_TD, grad_rows_RD)
    torch.testing.assert_close(grad_x_TD, reference.gather_backward(grad_rows_RD, row_TK))


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


def test_a_missing_choice_does_not_catch_the_infinity_of_another_token():
    target_TK = torch.tensor([[0, 1], [-1, 1]], dtype=torch.int32)
    src_R, choice_R, offsets_G1, row_TK = reference.plan(target_TK, 2)
    end = int(offsets_G1[-1])
    y_RD = torch.ones(end, 4)
    y_RD[0] = float("inf")
    out_TD = combine(y_RD, torch.ones(2, 2), src_R[:end], choice_R[:end], row_TK)
    assert out_TD[0].isinf().all() and (out_TD[1] == 1).all()
