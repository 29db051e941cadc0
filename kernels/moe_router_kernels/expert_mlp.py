"""The experts of one rank as one differentiable operation, by the Triton GEMMs of `grouped`.

Saved for the backward pass are the tokens, the pre-activations and the ids; activations and
weighted rows are computed again in the epilogue of the first backward GEMM. The gradient of a
choice's weight is the dot of the incoming gradient's row with the activations, so the expert's
output is not kept for it. (SonicMoE, arXiv:2512.14080, saves the same.)
"""

from typing import Any

import torch
from torch import Tensor

from moe_router_kernels import grouped
from moe_router_kernels.tiles import Problem, pick
from moe_router_kernels.unpermute import combine_rows


class _ExpertMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weight_TK: Tensor,
        gate_up: Tensor,
        down: Tensor,
        src_R: Tensor,
        choice_R: Tensor,
        offsets_G1: Tensor,
        row_TK: Tensor,
    ) -> Tensor:
        ctx.dtypes = gate_up.dtype, down.dtype
        gate_up, down = gate_up.to(x_TD.dtype), down.to(x_TD.dtype)
        problem = Problem.of(x_TD, gate_up, src_R)
        rows = grouped.cut(offsets_G1, src_R.numel(), problem.m)
        pre_RF, act_RF, _ = grouped.rows_times_groups(
            x_TD,
            gate_up,
            rows,
            src_R=src_R,
            epilogue="swiglu",
            keep=any(ctx.needs_input_grad),
            tile=pick("up", problem),
        )
        assert act_RF is not None
        y_RD, _, _ = grouped.rows_times_groups(act_RF, down, rows, tile=pick("down", problem))
        ctx.save_for_backward(
            x_TD, weight_TK, gate_up, down, pre_RF, src_R, choice_R, offsets_G1, row_TK
        )
        return combine_rows(y_RD, row_TK, weight_TK)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weight_TK, gate_up, down, pre_RF, src_R, choice_R, offsets_G1, row_TK = (
            ctx.saved_tensors
        )
        grad_TD = grads[0].contiguous()
        problem = Problem.of(x_TD, gate_up, src_R)
        rows = grouped.cut(offsets_G1, src_R.numel(), problem.m)
        weight_R = weight_TK.flatten()[choice_R.clamp(min=0)]
        grad_pre, act_RF, dot_R = grouped.rows_times_groups(
            grad_TD, down, rows, src_R=src_R, backward=True, epilogue="swiglu_backward",
            pre_RF=pre_RF, weight_R=weight_R, tile=pick("down_backward", problem),
        )  # fmt: skip
        assert act_RF is not None and dot_R is not None
        grad_x = grad_weight = grad_gate_up = grad_down = None
        if ctx.needs_input_grad[0]:
            grad_rows, _, _ = grouped.rows_times_groups(
                grad_pre, gate_up, rows, backward=True, tile=pick("up_backward", problem)
            )
            grad_x = combine_rows(grad_rows, row_TK)
        if ctx.needs_input_grad[1]:
            dot_TK = dot_R[row_TK.clamp(min=0)]
            grad_weight = torch.where(row_TK < 0, 0.0, dot_TK).to(weight_TK.dtype)
        if ctx.needs_input_grad[2]:
            grad_gate_up = grouped.group_weights(
                x_TD, grad_pre, offsets_G1, src_R=src_R, gather="a", transposed=True,
                dtype=ctx.dtypes[0], tile=pick("gate_up_weights", problem),
            )  # fmt: skip
        if ctx.needs_input_grad[3]:
            grad_down = grouped.group_weights(
                grad_TD, act_RF, offsets_G1, src_R=src_R, gather="a", dtype=ctx.dtypes[1],
                tile=pick("down_weights", problem),
            )  # fmt: skip
        return grad_x, grad_weight, grad_gate_up, grad_down, None, None, None, None


def expert_mlp(
    x_TD: Tensor,
    weight_TK: Tensor,
    gate_up: Tensor,
    down: Tensor,
    src_R: Tensor,
    choice_R: Tensor,
    offsets_G1: Tensor,
    row_TK: Tensor,
) -> Tensor:
    """Each token's sum over its choices of weight * down(silu(gate x) * up x).

    Args:
        x_TD: (T, D) bf16, fp16 or fp32, contiguous.
        weight_TK: (T, K) fp32.
        gate_up: (G, 2 F, D), gate first; contiguous, of any float dtype.
        down: (G, D, F), likewise.
        src_R, choice_R, offsets_G1, row_TK: int32, of a Plan over the G groups.

    Returns:
        (T, D) of x's dtype. Sums over K are fp32 in order of k; everything repeats bit by bit.
    """
    plan = (src_R, choice_R, offsets_G1, row_TK)
    out: Tensor = _ExpertMLP.apply(x_TD, weight_TK, gate_up, down, *plan)  # type: ignore[no-untyped-call]
    return out
