"""Waiting for the actors of a group without ever hanging: the dead, the frozen and the failed."""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from moe_router.errors import MoeRouterError, WorkerLostError
from moe_router_cluster.lost import ActorsLost

POLL_S = 0.5
GRACE_S = 2.0  # for survivors to answer, once one rank is known to be lost


class Waiting:
    """Waits for one answer from each of some ranks.

    A dead actor is reported by Ray at once. A frozen one leaves its ping unanswered for timeout_s.
    A survivor may hang in a ring behind ranks that have already given up, until the collective's
    own timeout: it gets GRACE_S, then counts as stuck.

    Args:
        shards: actor handles, rank i at index i.
        refs: by rank, the call that it is doing.
        timeout_s: how long a ping may stay unanswered.
        patience_s: how long a call may take of ranks that are alive.
    """

    def __init__(
        self,
        shards: Sequence[Any],
        refs: Mapping[int, Any],
        timeout_s: float,
        patience_s: float = math.inf,
    ) -> None:
        self._shards = shards
        self._pending = {ref: rank for rank, ref in refs.items()}
        self._timeout_s = timeout_s + 2 * POLL_S  # collectives that time out speak first
        self._answers: dict[int, Any] = {}
        self._lost: dict[int, str] = {}
        self._broken: str | None = None  # what a survivor said
        self._give_up_at = time.monotonic() + patience_s
        self._pings: dict[int, tuple[Any, float]] = {}

    def answers(self) -> list[Any]:
        """One answer a rank, in order.

        Raises:
            ActorsLost: some rank is gone, or said that another is.
            MoeRouterError: the first that an actor raised.
        """
        while self._pending:
            done, _ = ray.wait(list(self._pending), timeout=POLL_S)
            for ref in done:
                self._settle(ref, self._pending.pop(ref))
            self._ping()
            if time.monotonic() > self._give_up_at:
                break  # whoever has not answered by now is stuck
        if self._lost or self._broken is not None or self._pending:
            reason = "; ".join(f"actor {rank} {why}" for rank, why in sorted(self._lost.items()))
            stuck = self._broken or f"actors {sorted(self._pending.values())} did not finish"
            raise ActorsLost(self._lost, reason or stuck, self._pending.values())
        return [self._answers[rank] for rank in sorted(self._answers)]

    def _settle(self, ref: Any, rank: int) -> None:
        try:
            self._answers[rank] = ray.get(ref)
        except RayActorError:
            self._lost[rank] = "died"
        except RayTaskError as error:
            cause = error.cause
            if not isinstance(cause, MoeRouterError):
                raise
            if not isinstance(cause, WorkerLostError):
                raise cause from None
            self._broken = str(cause)

    def _ping(self) -> None:
        now = time.monotonic()
        for rank in self._pending.values():
            ping, since = self._pings.get(rank, (None, now))
            if ping is None or ray.wait([ping], timeout=0)[0]:
                self._pings[rank] = (self._shards[rank].ping.remote(), now)
            elif now - since > self._timeout_s:
                self._lost[rank] = f"has not answered for {now - since:.0f} s"
        self._pending = {r: rank for r, rank in self._pending.items() if rank not in self._lost}
        self._hurry()

    def _hurry(self) -> None:
        """From the first sign of a loss on, the others have GRACE_S."""
        if self._lost or self._broken is not None:
            self._give_up_at = min(self._give_up_at, time.monotonic() + GRACE_S)
