"""The gRPC front of the gating service: calls to the service, and streams of what it tells.

It takes the service as an argument: `InProcess` around a `GatingService`, or whatever else has the
methods of `Gating`, such as the adapter of the Ray actor in `cluster`. Streams hold no threads, and
nothing for a reader but the message that it is to take next: the newest.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from typing import Any, Protocol

import torch
from torch import Tensor

from moe_router.gating import GatingService
from moe_router.gating_records import Load, Snapshot, need
from moe_router.gating_route import Decision
from moe_router.serving import router_pb2 as pb
from moe_router.serving.grpc_server import Adder
from moe_router.serving.matrices import from_matrix
from moe_router.serving.router_messages import load_message, reply_message, snapshot_message
from moe_router.serving.router_pb2_grpc import RouterServicer, add_RouterServicer_to_server

_WATCH_S = 1.0  # one wait for a new epoch: so long a lost service or a closing server may go unseen
_EVERY_MS = 1000
_LEAST_MS, _MOST_MS = 100, 60_000


class Gating(Protocol):
    """`GatingService` for an event loop; see there."""

    async def load(self) -> Load: ...
    async def watch(self, after_epoch: int, timeout_s: float) -> Snapshot | None: ...
    async def heartbeat(self, rank: int) -> int: ...
    async def report_load(self, rank: int, epoch: int, load_LE: Tensor) -> None: ...
    async def route(
        self, model: str, layer: int, epoch: int, x_TD: Tensor, offsets_B1: Tensor | None
    ) -> Decision: ...


class InProcess:
    """A `GatingService` of this process.

    What takes microseconds runs on the event loop. Waiting and routing have threads of their own,
    so that none stands behind the other; a call that was given up before its turn is not run.
    """

    def __init__(self, service: GatingService) -> None:
        self._service = service
        self._waiting = ThreadPoolExecutor(2, "gating-watch")
        self._routing = ThreadPoolExecutor(min(8, os.cpu_count() or 1), "gating-route")

    async def load(self) -> Load:
        return self._service.load()

    async def watch(self, after_epoch: int, timeout_s: float) -> Snapshot | None:
        loop, watch = asyncio.get_running_loop(), self._service.watch
        return await loop.run_in_executor(self._waiting, watch, after_epoch, timeout_s)

    async def heartbeat(self, rank: int) -> int:
        return self._service.heartbeat(rank)

    async def report_load(self, rank: int, epoch: int, load_LE: Tensor) -> None:
        self._service.report_load(rank, epoch, load_LE)

    async def route(
        self, model: str, layer: int, epoch: int, x_TD: Tensor, offsets_B1: Tensor | None
    ) -> Decision:
        decide = partial(self._service.route, model, layer, epoch, x_TD, offsets_B1)
        return await asyncio.get_running_loop().run_in_executor(self._routing, decide)


def router_adder(gating: Gating) -> Adder:
    """For `serve_grpc`: the service `Router` over `gating`."""
    return Adder("moe_router.v1.Router", partial(add_RouterServicer_to_server, GatingFront(gating)))


class GatingFront(RouterServicer):
    """The methods of `service Router`. Errors become status codes in `grpc_guard`."""

    def __init__(self, gating: Gating) -> None:
        self._gating = gating
        self._asked: dict[Hashable, asyncio.Future[Any]] = {}
        self._message = lru_cache(maxsize=2)(snapshot_message)  # with and without weights

    async def WatchSnapshot(
        self, request: pb.WatchSnapshotRequest, context: Any
    ) -> AsyncIterator[pb.Snapshot]:
        after = request.after_epoch
        while True:
            found = await self._next(after)
            if found is not None:
                after = found.epoch
                yield self._message(found, with_weights=request.with_weights)

    async def Inspect(self, request: pb.InspectRequest, context: Any) -> AsyncIterator[pb.Load]:
        every_ms = request.every_ms or _EVERY_MS
        fits = _LEAST_MS <= every_ms <= _MOST_MS
        need(fits, "every_ms", every_ms, f"{_LEAST_MS}..{_MOST_MS}, or 0 for {_EVERY_MS}")
        loop, every_s = asyncio.get_running_loop(), every_ms / 1000
        while True:
            yield load_message(await self._load())
            # all streams of one pace wake together, and share what they ask for
            await asyncio.sleep(every_s - loop.time() % every_s)

    async def Heartbeat(self, request: pb.HeartbeatRequest, context: Any) -> pb.HeartbeatReply:
        return pb.HeartbeatReply(epoch=await self._gating.heartbeat(request.rank))

    async def ReportLoad(self, request: pb.ReportLoadRequest, context: Any) -> pb.ReportLoadReply:
        load_LE = from_matrix(request.load_LE, "load_LE")
        await self._gating.report_load(request.rank, request.epoch, load_LE)
        return pb.ReportLoadReply()

    async def Route(self, request: pb.RouteRequest, context: Any) -> pb.RouteReply:
        x_TD = from_matrix(request.x_TD, "x_TD")
        bounds = list(request.offsets_B1)
        # int64: uint32 goes beyond int32, and the service compares the last one with T
        offsets_B1 = torch.tensor(bounds, dtype=torch.int64) if bounds else None
        decision = await self._gating.route(
            request.model, request.layer, request.epoch, x_TD, offsets_B1
        )
        return reply_message(decision)

    async def _next(self, after: int) -> Snapshot | None:
        """The present snapshot if it is another than `after`, else one that comes soon, if any.

        Whatever clients call the last epoch they know, waiting begins from the service's own, so
        that all of them share one wait.
        """
        present = (await self._load()).epoch
        key, timeout_s = (present, _WATCH_S) if present in (0, after) else (0, 0.0)
        watch = partial(self._gating.watch, key, timeout_s)
        found: Snapshot | None = await self._joined((key, timeout_s), watch)
        return None if found is None or found.epoch == after else found

    async def _load(self) -> Load:
        found: Load = await self._joined("load", self._gating.load)
        return found

    async def _joined(self, key: Hashable, ask: Callable[[], Awaitable[Any]]) -> Any:
        """What is asked already is not asked again, but waited for together."""
        asked = self._asked.get(key)
        if asked is None:
            asked = self._asked[key] = asyncio.ensure_future(ask())
            asked.add_done_callback(lambda _: self._asked.pop(key))
        return await asyncio.shield(asked)  # a stream that ends must not end the others
