"""What the engine needs of the ranks, and the least there is of it: one rank in this process."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from moe_router.errors import ClusterError, ConfigError, WorkerLostError
from moe_router.models import CausalLM
from moe_router.serving.decoder import Decoder
from moe_router.serving.requests import Event, Work
from moe_router.training.calibrate import Shifts


class Group(Protocol):
    """The ranks that compute; all of them take part in every pass."""

    ranks: int

    async def step(self, work: Sequence[Work]) -> list[list[Event]]:
        """One pass of every rank, work and events by rank. Raises WorkerLostError."""
        ...

    async def ping(self) -> None:
        """Raises WorkerLostError: a rank does not answer."""
        ...

    async def recover(self, lost: WorkerLostError) -> None:
        """Make all ranks ready anew, empty. Raises ClusterError: there is no hope."""
        ...

    async def shift_of(self, budget: float) -> float:
        """What a compute budget comes to; never beside a pass.

        Raises:
            WorkerLostError: as `step`.
            ConfigError: a model that cannot be asked.
            DataError: its training data, which it takes, is not here.
        """
        ...


class OneRank:
    """A group of one, in this process. Its passes run in one thread: CUDA's libraries set up each
    thread anew.

    Args:
        shifts: for requests with a compute budget.
        remember: as in `Decoder`.
    """

    ranks = 1

    def __init__(
        self,
        model: CausalLM,
        stop_id: int | None,
        shifts: Shifts | None = None,
        remember: int = 0,
    ) -> None:
        self._decoder, self._shifts = Decoder(model, stop_id, remember=remember), shifts
        self._thread = ThreadPoolExecutor(1, "decoder")

    async def step(self, work: Sequence[Work]) -> list[list[Event]]:
        loop = asyncio.get_running_loop()
        return [await loop.run_in_executor(self._thread, self._decoder.step, work[0])]

    async def ping(self) -> None:
        """It is here."""

    async def recover(self, lost: WorkerLostError) -> None:
        raise ClusterError(f"the only rank was lost: {lost}") from lost

    async def shift_of(self, budget: float) -> float:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._shift_of, budget)

    def _shift_of(self, budget: float) -> float:
        if self._shifts is None:
            raise ConfigError(f"compute budget {budget}: want a model with its run's config")
        self._shifts.prepare(budget)
        return self._shifts.find(budget)
