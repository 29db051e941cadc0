"""What the engine needs of the ranks, and the least there is of it: one rank in this process."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from moe_router.errors import ClusterError, WorkerLostError
from moe_router.models import CausalLM
from moe_router.serving.decoder import Decoder
from moe_router.serving.requests import Event, Work


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


class OneRank:
    """A group of one, in this process. Its passes run in one thread: CUDA's libraries set up each
    thread anew."""

    ranks = 1

    def __init__(self, model: CausalLM, stop_id: int | None) -> None:
        self._decoder = Decoder(model, stop_id)
        self._thread = ThreadPoolExecutor(1, "decoder")

    async def step(self, work: Sequence[Work]) -> list[list[Event]]:
        loop = asyncio.get_running_loop()
        return [await loop.run_in_executor(self._thread, self._decoder.step, work[0])]

    async def ping(self) -> None:
        """It is here."""

    async def recover(self, lost: WorkerLostError) -> None:
        raise ClusterError(f"the only rank was lost: {lost}") from lost
