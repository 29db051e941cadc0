"""One rank holds every expert: nothing moves. The reference every transport is compared with."""

from torch import Tensor

from moe_router.dispatch.base import Arrived, Dispatcher, Received
from moe_router.placement import Placement
from moe_router.types import Choice, Plan


class Local(Dispatcher):
    rank = 0
    ranks = 1

    def dispatch(
        self,
        x_TD: Tensor,
        choice: Choice,
        plan: Plan,
        placement: Placement,
        first_token: int = 0,
    ) -> Received:
        return Received(x_TD, lambda: Arrived(x_TD, choice, plan), None)

    def combine(self, y_ND: Tensor, received: Received) -> Tensor:
        return y_ND

    def total(self, x: Tensor) -> Tensor:
        return x
