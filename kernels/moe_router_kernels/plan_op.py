"""Who gets a row, and where it lies, as torch operations on ids: no gradient.

Each runs its Triton kernel or the reference, whichever `choose` says, with equal results.
"""

from typing import Any

import torch
from torch import Tensor

from moe_router_kernels import reference
from moe_router_kernels.choose import uses_triton
from moe_router_kernels.operation import operation

PlanTensors = tuple[Tensor, Tensor, Tensor, Tensor]


@operation("moe_router::plan_from_ids")
def _plan_from_ids(target_TK: Tensor, groups: int, triton: bool) -> PlanTensors:
    if triton:
        from moe_router_kernels import planning

        return planning.plan_from_ids(target_TK.contiguous(), groups)
    return reference.plan(real(target_TK, groups), groups)


@_plan_from_ids.register_fake
def _(target_TK: Tensor, groups: int, triton: bool) -> PlanTensors:
    R = target_TK.numel()
    sizes: tuple[Any, ...] = (R, R, groups + 1, tuple(target_TK.shape))
    src_R, choice_R, offsets_G1, row_TK = (target_TK.new_empty(size) for size in sizes)
    return src_R, choice_R, offsets_G1, row_TK


def plan_from_ids(target_TK: Tensor, groups: int, kernels: str = "auto") -> PlanTensors:
    """`reference.plan` for choices made elsewhere: src_R, choice_R, offsets_G1, row_TK.

    Args:
        target_TK: (T, K) int32; what is no group, -1 or past the last, gets no row.

    Raises:
        ValueError: ids of another dtype or shape.
    """
    check_ids("plan_from_ids", target_TK)
    plan: PlanTensors = _plan_from_ids(target_TK, groups, _plans(target_TK, groups, kernels))
    return plan


@operation("moe_router::within_capacity")
def _within_capacity(
    target_TK: Tensor, groups: int, order_R: Tensor, capacity: int, triton: bool
) -> Tensor:
    if triton:
        from moe_router_kernels import planning

        return planning.drop(target_TK.contiguous(), groups, order_R.int(), capacity)
    rank_TK = reference.rank_in_group(target_TK, groups, order_R)
    return target_TK.masked_fill(rank_TK >= capacity, -1)


@_within_capacity.register_fake
def _(target_TK: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(target_TK)


def within_capacity(
    target_TK: Tensor, groups: int, order_R: Tensor, capacity: int, kernels: str = "auto"
) -> Tensor:
    """(T, K) int32: the choices that are among the first `capacity` of their group, else -1.

    Args:
        target_TK: (T, K) int32 in [-1, groups).
        order_R: integers, permutation of the flat choices, first served first.
    """
    check_ids("within_capacity", target_TK)
    triton = _plans(target_TK, groups, kernels)
    kept_TK: Tensor = _within_capacity(target_TK, groups, order_R, capacity, triton)
    return kept_TK


@operation("moe_router::select_top_c")
def _select_top_c(score_TG: Tensor, offsets_S1: Tensor, count_S: Tensor, triton: bool) -> Tensor:
    if triton:
        from moe_router_kernels import top_c

        return top_c.select_top_c(score_TG, offsets_S1, count_S)
    return reference.select_top_c(score_TG, offsets_S1, count_S)


@_select_top_c.register_fake
def _(score_TG: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(score_TG, dtype=torch.bool)


def select_top_c(
    score_TG: Tensor, offsets_S1: Tensor, count_S: Tensor, kernels: str = "auto"
) -> Tensor:
    """(T, G) bool: whether a token is among the best of its segment for the group.

    Args:
        score_TG: floats.
        offsets_S1: int32 bounds of the segments; a token behind the last is taken by none.
        count_S: integers, tokens that each group takes of a segment.
        kernels: see `choose.uses_triton`.
    """
    S = count_S.numel()
    if score_TG.dim() != 2 or offsets_S1.shape != (S + 1,):
        raise ValueError(
            f"select_top_c: got scores {said(score_TG)} and offsets {said(offsets_S1)}, want "
            f"(tokens, groups) and ({S + 1},), bounds of {S} segments"
        )
    uncovered = "fp64" if score_TG.dtype == torch.float64 else ""
    triton = uses_triton("select_top_c", kernels, score_TG.device, uncovered)
    taken_TG: Tensor = _select_top_c(score_TG.detach(), offsets_S1, count_S, triton)
    return taken_TG


def real(raw_TK: Tensor, groups: int) -> Tensor:
    """-1 for what is no group."""
    return raw_TK.masked_fill((raw_TK < 0) | (raw_TK >= groups), -1)


def _plans(target_TK: Tensor, groups: int, kernels: str) -> bool:
    uncovered = f"{groups} groups: more than 1024" if groups > 1024 else ""
    return uses_triton("plan", kernels, target_TK.device, uncovered)


def check_ids(where: str, target_TK: Tensor) -> None:
    if target_TK.dim() != 2 or target_TK.dtype != torch.int32:
        raise ValueError(f"{where}: got {said(target_TK)}, want (tokens, choices) int32")


def said(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"
