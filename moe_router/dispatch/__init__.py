"""Move tokens to the ranks that hold their experts, and the results back."""

from moe_router.dispatch.all_to_all import AllToAll
from moe_router.dispatch.base import Dispatcher, Received
from moe_router.dispatch.local import Local

__all__ = ["AllToAll", "Dispatcher", "Local", "Received"]
