"""Move tokens to the ranks that hold their experts, and the results back."""

from moe_router.dispatch.all_to_all import AllToAll
from moe_router.dispatch.base import Dispatcher, Received
from moe_router.dispatch.bounded import Bounded
from moe_router.dispatch.gather_scatter import GatherScatter
from moe_router.dispatch.grid import Grid, Groups
from moe_router.dispatch.local import Local
from moe_router.dispatch.padded import Padded
from moe_router.dispatch.peer_memory import PeerMemory

__all__ = [
    "AllToAll",
    "Bounded",
    "Dispatcher",
    "GatherScatter",
    "Grid",
    "Groups",
    "Local",
    "Padded",
    "PeerMemory",
    "Received",
]
