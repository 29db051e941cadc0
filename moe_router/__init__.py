"""One learned router for experts, depth and attention.

`MoE` is a layer for anybody's torch module; `Router` is what decides inside it.
"""

from typing import Any

from moe_router.config import MoEConfig, RouterConfig
from moe_router.layers.moe import MoE
from moe_router.routing import Context, Ledger, Router
from moe_router.types import Choice, Plan, Routed, Tokens


def register_transformers() -> None:
    """Make `experts_implementation="moe_router"` known to transformers, which must be installed."""
    from moe_router.integrations import transformers

    transformers.register_transformers()


def wrap(model: Any, kind: str, **routing: Any) -> Any:
    """Route the tokens of a dense model of transformers; see `integrations.wrap`."""
    from moe_router.integrations import wrap

    return wrap.wrap(model, kind, **routing)


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
    "register_transformers",
    "wrap",
]
__version__ = "0.1.0"
