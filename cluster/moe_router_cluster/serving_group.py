"""A ShardGroup as the engine's `Group`: passes, pings, and ranks that are made anew."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_router.config import Config, require
from moe_router.errors import ClusterError, WorkerLostError
from moe_router.serving.requests import Event, Work
from moe_router_cluster.lost import ActorsLost
from moe_router_cluster.shard_group import ShardGroup

_HOUR_S = 3600.0
_log = logging.getLogger(__name__)


class ServingGroup:
    """Args:
    config: of the run; cluster says how many ranks, and where.
    step_dir: the checkpoint to serve; whoever is made anew reads it again.
    """

    def __init__(self, config: Config, step_dir: Path) -> None:
        self.ranks = config.cluster.actors
        self._config, self._step_dir = config, step_dir
        self._group = ShardGroup(config, step_dir.parent, bring="load")
        self._losses: deque[float] = deque()  # time.monotonic() of each

    def start(self) -> None:
        """Place the ranks and load the checkpoint. Raises as `ShardGroup.start`."""
        self._group.start(self._step_dir, _log.warning)

    async def step(self, work: Sequence[Work]) -> list[list[Event]]:
        return await asyncio.to_thread(self._group.deal, "decode", work)

    async def ping(self) -> None:
        await asyncio.to_thread(self._group.ask, "ping")

    async def recover(self, lost: WorkerLostError) -> None:
        """Replace what is lost and load the checkpoint again.

        Raises:
            ClusterError: more losses in an hour than cluster.max_recoveries.
        """
        await asyncio.to_thread(self._recover, lost)

    async def shift_of(self, budget: float) -> float:
        """See `Group.shift_of`. What one rank alone may lack is asked before all wait together."""
        await asyncio.to_thread(self._group.ask, "prepare_shifts", budget)
        found: list[float] = await asyncio.to_thread(self._group.ask, "find_shift", budget)
        return found[0]

    async def kill(self, rank: int) -> None:
        """SIGKILL a rank, to see what happens. Raises ConfigError: there is none of that number."""
        require(0 <= rank < self.ranks, "rank", rank, f"0..{self.ranks - 1}")
        await asyncio.to_thread(self._group.kill, rank)

    def routers(self) -> dict[str, Any]:
        """See `ExpertShard.routers`."""
        found: dict[str, Any] = self._group.ask_first("routers")
        return found

    def close(self) -> None:
        self._group.close()

    def _recover(self, lost: WorkerLostError) -> None:
        while True:
            self._require_hope(lost)
            try:
                gone = lost.ranks | lost.stuck if isinstance(lost, ActorsLost) else frozenset()
                self._group.replace(gone)
                self._group.form(self._step_dir)
                return
            except ActorsLost as again:
                lost = again

    def _require_hope(self, lost: WorkerLostError) -> None:
        now, most = time.monotonic(), self._config.cluster.max_recoveries
        self._losses.append(now)
        while self._losses[0] < now - _HOUR_S:
            self._losses.popleft()
        if len(self._losses) > most:
            raise ClusterError(
                f"{lost}: loss number {len(self._losses)} within an hour, want at most {most} "
                "(cluster.max_recoveries); see why actors die: memory, the node"
            ) from lost
