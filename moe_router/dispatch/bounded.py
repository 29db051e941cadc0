"""A transport with static bounds, beside the host splits for a step that does not fit them.

Whoever runs the step reads `Received.overflow` of all ranks together with the loss, and takes the
step again inside `exactly()` before the optimizer sees it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from torch import Tensor

from moe_router.dispatch.all_to_all import AllToAll
from moe_router.dispatch.base import Dispatcher, Received
from moe_router.placement import Placement
from moe_router.types import Choice, Plan


class Bounded(Dispatcher):
    """Args:
    static: moves tokens, and may overflow.
    exact: moves them inside `exactly()`.
    """

    def __init__(self, static: Dispatcher, exact: AllToAll) -> None:
        self.rank, self.ranks = exact.rank, exact.ranks
        self.static, self.exact = static, exact
        self._now: Dispatcher = static

    def dispatch(
        self,
        x_TD: Tensor,
        choice: Choice,
        plan: Plan,
        placement: Placement,
        first_token: int = 0,
    ) -> Received:
        by = self._now
        received = by.dispatch(x_TD, choice, plan, placement, first_token)
        return replace(received, handle=(by, received))

    def combine(self, y_ND: Tensor, received: Received) -> Tensor:
        by, inner = received.handle
        out_TD: Tensor = by.combine(y_ND, inner)
        return out_TD

    def total(self, x: Tensor) -> Tensor:
        return self.exact.total(x)

    @contextmanager
    def exactly(self) -> Iterator[None]:
        before, self._now = self._now, self.exact
        try:
            yield
        finally:
            self._now = before
