"""One decision of the gating service: hidden states from outside, checked, decided and planned."""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_router.gating_records import need
from moe_router.routing import Router, make_plan
from moe_router.routing.decide import capacity
from moe_router.types import Choice, Plan, Tokens
from moe_router_kernels import reference


@dataclass(frozen=True, slots=True, eq=False)
class Decision:
    """What `route` answers.

    Attributes:
        choice, plan: as a routed layer makes them.
        capacity: most rows an expert takes of this batch; None is dropless.
        position_TK: int32, place of each choice among its expert's rows; -1 is dropped or none.
    """

    epoch: int
    choice: Choice
    plan: Plan
    capacity: int | None
    position_TK: Tensor


@torch.no_grad()
def decide(epoch: int, router: Router, tokens: Tokens) -> Decision:
    """As a routed layer does in evaluation."""
    choice, config = router(tokens), router.config
    bounded = config.policy == "expert_choice" or config.capacity_factor is not None
    limit = capacity(tokens.x_TD.size(0), config) if bounded else None
    plan = make_plan(
        choice, config.experts, capacity=limit, drop=config.drop, position_T=tokens.position_T
    )
    return Decision(epoch, choice, plan, limit, _positions(choice, plan))


def checked_tokens(where: str, x_TD: Tensor, dim: int, offsets_B1: Tensor | None) -> Tokens:
    """Tokens from outside, with the positions that the bounds give.

    Args:
        where: the router, for messages.
        dim: hidden size D of the router.

    Raises:
        GatingError: another D or dtype, bounds that are none, values that are not finite.
    """
    fits = x_TD.dim() == 2 and x_TD.size(1) == dim
    need(fits, f"x_TD for {where}", tuple(x_TD.shape), f"(T, {dim})")
    known = x_TD.dtype in (torch.float32, torch.bfloat16)
    need(known, f"x_TD for {where}", x_TD.dtype, "float32 or bfloat16")
    need(bool(x_TD.isfinite().all()), f"x_TD for {where}", "NaN or infinite", "finite values")
    T = x_TD.size(0)
    bounds = torch.tensor([0, T]) if offsets_B1 is None else offsets_B1.to("cpu", torch.int64)
    sound = bounds.dim() == 1 and bounds.numel() >= 2 and int(bounds[0]) == 0
    sound = sound and int(bounds[-1]) == T and bool((bounds.diff() >= 0).all())
    shown = bounds.flatten()[:8].tolist()
    need(sound, f"offsets_B1 for {where}", shown, f"0, ascending, and {T} at the end")
    position_T = torch.arange(T) - bounds[reference.sequence_of(bounds, T)]
    return Tokens(x_TD, position_T.int(), bounds.int())


def _positions(choice: Choice, plan: Plan) -> Tensor:
    """(T, K) int32: rows of an expert lie together, so the row less the expert's first one."""
    first_TK = plan.offsets_G1[choice.target_TK.clamp(min=0).long()]
    return torch.where(plan.row_TK < 0, -1, plan.row_TK - first_TK)
