"""What compute budgets come to, as shifts of the routers: each is found once, between passes."""

import asyncio
from collections import deque

from moe_router.errors import MoeRouterError, WorkerLostError
from moe_router.serving.group import Group
from moe_router.training.calibrate import in_hundredths


class Budgets:
    def __init__(self) -> None:
        self._shifts: dict[float, asyncio.Future[float]] = {}
        self._wanted: deque[float] = deque()

    @property
    def wanted(self) -> bool:
        """Somebody waits for one that is not known."""
        return bool(self._wanted)

    def shift_of(self, budget: float) -> asyncio.Future[float]:
        """Known, or to be found; shared by who asks, so shield it. Raises ConfigError: no share."""
        budget = in_hundredths(budget)  # so there are 101 of them, whatever clients ask
        if budget not in self._shifts:
            self._shifts[budget] = asyncio.get_running_loop().create_future()
            self._wanted.append(budget)
        return self._shifts[budget]

    async def find(self, group: Group) -> None:
        """Find the next one. Raises WorkerLostError: it stays wanted."""
        budget = self._wanted[0]
        try:
            shift = await group.shift_of(budget)
        except WorkerLostError:
            raise
        except MoeRouterError as error:
            self._refuse(error)
        else:
            self._shifts[self._wanted.popleft()].set_result(shift)

    def fail(self, error: MoeRouterError) -> None:
        """None will be found any more."""
        while self._wanted:
            self._refuse(error)

    def _refuse(self, error: MoeRouterError) -> None:
        future = self._shifts.pop(self._wanted.popleft())
        future.set_exception(error)
        future.exception()  # whoever asked may have gone
