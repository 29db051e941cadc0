"""The experts of one rank, forward and backward, by the Triton GEMMs of `grouped`; few rows without
gradients by `few_rows`.

Kept for the backward pass are the tokens, the pre-activations and the ids; activations and
weighted rows are computed again in the epilogue of the first backward GEMM, which may write
its gradients where the pre-activations were. The gradient of a choice's weight is the dot of the
incoming gradient's row with the activations, so the expert's output is not kept for it. (SonicMoE,
arXiv:2512.14080, saves the same.)
"""

import torch
from torch import Tensor

from moe_router_kernels import few_rows, grouped
from moe_router_kernels.permute import combine_rows
from moe_router_kernels.row_tiles import cut
from moe_router_kernels.tiles import Few, Problem, pick

Plan = tuple[Tensor, Tensor, Tensor, Tensor]


def forward(
    x_TD: Tensor, weight_TK: Tensor, gate_up: Tensor, down: Tensor, plan: Plan, keep: bool
) -> tuple[Tensor, Tensor]:
    """(T, D) of x's dtype, and (R, 2 F) pre-activations if they are to be kept, else (0, 2 F)."""
    src_R, _, offsets_G1, row_TK = plan
    x_TD, weight_TK, gate_up, down = (t.contiguous() for t in (x_TD, weight_TK, gate_up, down))
    problem = Problem.of(x_TD, gate_up, src_R)
    if problem.few and not keep:
        none = x_TD.new_empty(0, gate_up.size(1))
        return few_rows.forward(x_TD, weight_TK, gate_up, down, plan=plan, few=Few()), none
    rows = cut(offsets_G1, src_R.numel(), problem.m)
    pre_RF, act_RF, _ = grouped.rows_times_groups(
        x_TD, gate_up, rows, src_R=src_R, epilogue="swiglu", keep=keep, tile=pick("up", problem)
    )
    assert act_RF is not None
    y_RD, _, _ = grouped.rows_times_groups(act_RF, down, rows, tile=pick("down", problem))
    return combine_rows(y_RD, row_TK, weight_TK), pre_RF


def backward(
    grad_TD: Tensor,
    x_TD: Tensor,
    weight_TK: Tensor,
    gate_up: Tensor,
    down: Tensor,
    pre_RF: Tensor,
    plan: Plan,
    dtypes: tuple[torch.dtype, torch.dtype],
    wanted: list[bool],
    overwrite: bool = False,
) -> list[Tensor | None]:
    """Gradients of x, weights, gate_up and down, where wanted.

    Args:
        dtypes: of the gradients of gate_up and down.
        overwrite: put the gradient of pre_RF where pre_RF is.
    """
    src_R, choice_R, offsets_G1, row_TK = plan
    grad_TD, x_TD, gate_up, down = (t.contiguous() for t in (grad_TD, x_TD, gate_up, down))
    problem = Problem.of(x_TD, gate_up, src_R)
    rows = cut(offsets_G1, src_R.numel(), problem.m)
    weight_R = weight_TK.flatten()[choice_R.clamp(min=0)]
    grad_pre, act_RF, dot_R = grouped.rows_times_groups(
        grad_TD, down, rows, src_R=src_R, backward=True, epilogue="swiglu_backward",
        pre_RF=pre_RF, overwrite=overwrite, weight_R=weight_R, tile=pick("down_backward", problem),
    )  # fmt: skip
    assert act_RF is not None and dot_R is not None
    grads: list[Tensor | None] = [None] * 4
    if wanted[1]:
        dot_TK = dot_R[row_TK.clamp(min=0)]
        grads[1] = torch.where(row_TK < 0, 0.0, dot_TK).to(weight_TK.dtype)
    # what is large goes as soon as it is read: rows, then activations
    if wanted[0]:
        grad_rows, _, _ = grouped.rows_times_groups(
            grad_pre, gate_up, rows, backward=True, tile=pick("up_backward", problem)
        )
        grads[0] = combine_rows(grad_rows, row_TK)
        del grad_rows
    if wanted[3]:
        grads[3] = grouped.group_weights(
            grad_TD, act_RF, offsets_G1, src_R=src_R, gather="a", dtype=dtypes[1],
            tile=pick("down_weights", problem),
        )  # fmt: skip
    del act_RF
    if wanted[2]:
        grads[2] = grouped.group_weights(
            x_TD, grad_pre, offsets_G1, src_R=src_R, gather="a", transposed=True,
            dtype=dtypes[0], tile=pick("gate_up_weights", problem),
        )  # fmt: skip
    return grads
