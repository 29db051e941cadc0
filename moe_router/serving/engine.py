"""Requests in, streams of text out: one loop drives the ranks of a group, pass by pass.

START HERE for serving: docs/life-of-a-request.md follows a request through this file.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress
from dataclasses import replace
from time import perf_counter

from moe_router.config import ServeConfig
from moe_router.errors import ClusterError, MoeRouterError, WorkerLostError
from moe_router.serving.asking import requests_of
from moe_router.serving.budgets import Budgets
from moe_router.serving.chat import Chat
from moe_router.serving.group import Group
from moe_router.serving.meters import Meters
from moe_router.serving.requests import Ask, Event, Health, Piece, Work
from moe_router.serving.scheduler import Limits, Scheduler
from moe_router.serving.waiting import TOGETHER_S, Inbox, Waiting
from moe_router.training.data import Tokenizer

_log = logging.getLogger(__name__)


class Engine:
    """Use it as `async with Engine(...) as engine`.

    Args:
        group: ready, and empty.
        model: the name that clients know.
        defaults: for what a request leaves out.
        together_s: least seconds between pieces of an answer; 0: each token is one.
    """

    def __init__(
        self,
        group: Group,
        tokenizer: Tokenizer,
        model: str,
        defaults: ServeConfig | None = None,
        limits: Limits | None = None,
        together_s: float = TOGETHER_S,
    ) -> None:
        self.model = model
        self._group, self._tokenizer = group, tokenizer
        self._defaults, self._together_s = defaults or ServeConfig(), together_s
        self._scheduler = Scheduler(group.ranks, limits or Limits())
        self._open: dict[int, Waiting] = {}
        self._next_id = 0
        self._wake = asyncio.Event()
        self._lost: WorkerLostError | None = None  # what `check` has found
        self._recovering = ""  # why
        self._recoveries = 0
        self._failed = ""  # why there is no hope
        self._loop: asyncio.Task[None] | None = None
        self._meters = Meters()
        self._budgets = Budgets()
        self._chat: Chat | None = None  # once somebody has asked for it

    async def __aenter__(self) -> "Engine":
        self._loop = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._loop is not None:
            self._loop.cancel()
            with suppress(asyncio.CancelledError):
                await self._loop
        self._fail("the server has ended")

    async def stream(self, ask: Ask) -> AsyncGenerator[Piece]:
        """Answer every prompt of `ask`. Closing the iterator ends the work on it.

        Raises:
            ConfigError: the request cannot be met as it is.
            DataError: a compute budget takes training data, which is not here.
            QueueFullError: too many wait.
            ClusterError: the ranks are gone for good.
        """
        if self._failed:
            raise ClusterError(self._failed)
        if ask.messages:
            self._chat = self._chat or Chat.of(self._tokenizer)
            prompt = self._chat.encode(ask.messages)
            ask = replace(ask, prompts=(prompt,), messages=(), stop=(*ask.stop, *self._chat.stop))
        shift = 0.0 if ask.compute_budget is None else await self._shift_of(ask.compute_budget)
        made = (self._tokenizer, self._defaults, self._next_id)
        requests = requests_of(ask, *made, shift)
        self._next_id += len(requests)
        self._scheduler.add(requests)
        inbox = Inbox(0.0 if ask.trace else self._together_s)  # a trace is of one token
        for index, request in enumerate(requests):
            self._open[request.id] = Waiting.of(inbox, index, request, ask, self._tokenizer)
        self._wake.set()
        left = len(requests)
        try:
            while left:
                for piece in await inbox.take():
                    left -= piece.finish != ""
                    yield piece
        finally:
            for request in requests:
                if self._open.pop(request.id, None) is not None:
                    self._scheduler.drop(request.id)
                    self._meters.finished["abandoned"] += 1
            self._wake.set()

    async def health(self) -> Health:
        """Red while the ranks are made anew."""
        reason = self._failed or self._recovering
        return Health(not reason, reason, self.model)

    async def metrics(self) -> str:
        """For Prometheus."""
        scheduler = self._scheduler
        health = await self.health()
        gauges = {"running": scheduler.running, "waiting": scheduler.waiting}
        return self._meters.text(
            {**gauges, "cache_use": scheduler.cache_use, "healthy": float(health.ok)}
        )

    def _meter_admitted(self, work: Sequence[Work]) -> None:
        now = perf_counter()
        for request in (request for rank in work for request in rank.admit):
            waiting = self._open.get(request.id)
            if waiting is not None and not request.made:  # else a lost rank had it before
                self._meters.seconds["queue_seconds"].add(now - waiting.asked)
                self._meters.counts["prompt_tokens_total"] += len(request.prompt)

    def _meter_token(self, waiting: Waiting) -> None:
        now, kind = perf_counter(), "time_per_output_token_seconds"
        if waiting.last is None:
            waiting.last, kind = waiting.asked, "time_to_first_token_seconds"
        self._meters.seconds[kind].add(now - waiting.last)
        self._meters.counts["generation_tokens_total"] += 1
        waiting.last = now

    async def check(self) -> None:
        """Find lost ranks also while nothing is computed; they are then replaced.

        Raises:
            ClusterError: the ranks are gone for good.
        """
        if self._failed:
            raise ClusterError(self._failed)
        if self._recovering:
            return
        asked = self._recoveries
        try:
            await self._group.ping()
        except WorkerLostError as error:
            if asked == self._recoveries:  # else a pass has found it meanwhile
                self._lost = error
                self._wake.set()

    async def _shift_of(self, budget: float) -> float:
        shift = self._budgets.shift_of(budget)
        self._wake.set()
        return await asyncio.shield(shift)

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            try:
                if self._lost is not None:
                    raise self._lost
                if self._budgets.wanted:
                    await self._budgets.find(self._group)
                    continue
                if not self._scheduler.busy:
                    self._wake.clear()
                    continue
                work = self._scheduler.plan()
                self._meter_admitted(work)
                self._deliver(await self._group.step(work))
            except WorkerLostError as lost:
                await self._recover(lost)
            except Exception as error:
                # a bug of ours must not leave clients waiting for ever
                _log.error("a pass failed", exc_info=error)
                self._fail(f"{type(error).__name__} in a pass; the server's log has it")
            if self._failed:
                return

    def _deliver(self, events: Sequence[Sequence[Event]]) -> None:
        for event in (event for rank in events for event in rank):
            waiting = self._open.get(event.id)
            if waiting is None:
                self._scheduler.ended(event.id)
                continue
            self._meters.counts["prompt_tokens_known_total"] += event.known
            if event.token is not None:
                self._scheduler.made(event.id, event.token)
                self._meter_token(waiting)
            finish = waiting.take(event)
            if finish:
                del self._open[event.id]
                self._meters.finished[finish] += 1
                (self._scheduler.ended if event.finish else self._scheduler.drop)(event.id)

    async def _recover(self, lost: WorkerLostError) -> None:
        self._recovering, self._lost = str(lost), None
        self._recoveries += 1
        self._meters.counts["recoveries_total"] += 1
        _log.warning("ranks are made anew: %s", lost)
        self._scheduler.restart()
        try:
            await self._group.recover(lost)
        except MoeRouterError as error:
            self._fail(str(error))
        except Exception as error:
            # as in a pass: a bug, or a disk that fails once, must not leave clients waiting
            _log.error("ranks cannot be made anew", exc_info=error)
            self._fail(f"{type(error).__name__} in a recovery; the server's log has it")
        self._recovering = ""
        self._lost = None

    def _fail(self, reason: str) -> None:
        """Nobody waits for what will never come."""
        self._failed = reason
        self._budgets.fail(ClusterError(reason))
        for waiting in self._open.values():
            waiting.inbox.fail(ClusterError(reason))
