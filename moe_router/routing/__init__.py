"""Score, decide, plan, account: which group processes which token."""

from moe_router.routing.context import Context, PlanMemory
from moe_router.routing.ledger import Ledger
from moe_router.routing.plan import make_plan, plan_from_ids
from moe_router.routing.router import Router

__all__ = ["Context", "Ledger", "PlanMemory", "Router", "make_plan", "plan_from_ids"]
