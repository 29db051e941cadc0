"""The transports by name, and one round trip through any of them."""

import torch
from torch import Tensor

from moe_router.dispatch.all_to_all import AllToAll
from moe_router.dispatch.base import Dispatcher, Group
from moe_router.dispatch.gather_scatter import GatherScatter
from moe_router.dispatch.padded import Padded
from moe_router.dispatch.peer_memory import PeerMemory
from moe_router.placement import Placement
from moe_router.types import Choice, Plan

NAMES = ("all_to_all", "padded", "gather_scatter", "peer_memory")


def make_transport(
    name: str, tokens: int, factor: float, group: Group = None, timeout_s: float = 60.0
) -> Dispatcher:
    """Args:
    name: one of NAMES.
    tokens, factor: bounds of the static ones; see `Padded`.
    timeout_s: of `PeerMemory`.
    """
    match name:
        case "all_to_all":
            return AllToAll(group)
        case "padded":
            return Padded(tokens, factor, group)
        case "gather_scatter":
            return GatherScatter(tokens, factor, group)
        case "peer_memory":
            return PeerMemory(tokens, factor, group, timeout_s=timeout_s)
    raise ValueError(f"transport {name}: want one of {', '.join(NAMES)}")


def round_trip(
    dispatcher: Dispatcher, x_TD: Tensor, choice: Choice, plan: Plan, placement: Placement
) -> tuple[Tensor, Tensor]:
    """Out and back with nothing computed: an expert rank returns the token as it came, once.

    Returns:
        (T, D) each token times the number of ranks that serve it, and the overflow flag.
    """
    received = dispatcher.dispatch(x_TD, choice, plan, placement)
    served_N1 = (received.plan.row_TK >= 0).any(1, keepdim=True)
    # where, not a product: an empty slot may hold anything
    out_TD = dispatcher.combine(torch.where(served_N1, received.x_ND, 0.0), received)
    none = torch.zeros((), dtype=torch.bool, device=x_TD.device)
    return out_TD, none if received.overflow is None else received.overflow
