"""One rank holds every expert: nothing moves. The reference every transport is compared with."""

from torch import Tensor

from moe_router.dispatch.base import Received
from moe_router.placement import Placement
from moe_router.types import Choice, Plan
from moe_router_kernels import combine


class Local:
    rank = 0
    ranks = 1

    def dispatch(self, x_TD: Tensor, choice: Choice, plan: Plan, placement: Placement) -> Received:
        return Received(x_TD, choice, plan, None)

    def combine(self, y_RD: Tensor, received: Received) -> Tensor:
        plan = received.plan
        return combine(y_RD, received.choice.weight_TK, plan.src_R, plan.choice_R, plan.row_TK)

    def total(self, x: Tensor) -> Tensor:
        return x
