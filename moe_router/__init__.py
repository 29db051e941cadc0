"""One learned router for experts, depth and attention.

`MoE` is a layer for anybody's torch module; `Router` is what decides inside it.
"""

from moe_router.config import MoEConfig, RouterConfig
from moe_router.layers.moe import MoE
from moe_router.routing import Context, Ledger, Router
from moe_router.types import Choice, Plan, Routed, Tokens

__all__ = [
    "Choice",
    "Context",
    "Ledger",
    "MoE",
    "MoEConfig",
    "Plan",
    "Routed",
    "Router",
    "RouterConfig",
    "Tokens",
]
__version__ = "0.1.0"
