"""From choices to rows: who gets a row, and where it lies."""

import torch
from torch import Tensor

import moe_router_kernels as kernels
from moe_router.config import require
from moe_router.types import Choice, Plan
from moe_router_kernels import reference


def plan_from_ids(target_TK: Tensor, groups: int, rows: int | None = None) -> Plan:
    """A dropless Plan from ids alone.

    Args:
        target_TK: (T, K) int32 in [-1, groups); -1 gets no row.
        rows: a bound R that is known to be enough; default: T * K.
    """
    src_R, choice_R, offsets_G1, row_TK = kernels.plan_from_ids(target_TK, groups)
    return Plan(src_R[:rows], choice_R[:rows], offsets_G1, row_TK)


def make_plan(
    choice: Choice,
    groups: int,
    *,
    capacity: int | None = None,
    drop: str = "position",
    position_T: Tensor | None = None,
    sources: int = 1,
) -> Plan:
    """A Plan in which no group takes more than `capacity` choices of one source.

    Args:
        capacity: rows of one group from one source; None is dropless.
        drop: who is served first: `position`, the earlier in its sequence; `score`, the heavier.
        position_T: (T,) int32, needed for `position`.
        sources: ranks whose tokens stand one after another in T, equally many each; capacity is
            counted for each of them, so that one rank can repeat what several do.

    Raises:
        ConfigError: another `drop`, no positions to drop by, or sources of unequal length.
    """
    if capacity is None and choice.plan is not None:
        return choice.plan
    target_TK = choice.target_TK
    if capacity is not None:
        T = target_TK.size(0)
        require(T % sources == 0, "sources", sources, f"a divisor of {T} tokens")
        if drop == "position":
            require(position_T is not None, "position_T", None, "positions, for drop=position")
            assert position_T is not None
            order = reference.serve_by_position(position_T, target_TK.size(1))
        else:
            require(drop == "score", "drop", drop, "position or score")
            order = reference.serve_by_score(choice.weight_TK.detach())
        apart_TK = target_TK
        if sources > 1:
            source_T = torch.arange(T, device=target_TK.device, dtype=torch.int32) // (T // sources)
            apart_TK = torch.where(target_TK < 0, -1, target_TK + source_T[:, None] * groups)
        kept_TK = kernels.within_capacity(apart_TK, groups * sources, order, capacity)
        target_TK = target_TK.masked_fill(kept_TK < 0, -1)
    return plan_from_ids(target_TK, groups)
