"""The gRPC front of the gating service: messages to calls and back.

It takes the service as an argument: `InProcess` around a `GatingService`, or whatever else has the
methods of `Gating`, such as the adapter of the Ray actor in `cluster`.
"""

import asyncio
import dataclasses
import json
from collections.abc import AsyncIterator
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from moe_router.config import RouterConfig
from moe_router.errors import GatingError
from moe_router.gating import Decision, GatingService
from moe_router.gating_records import RouterWeights, Snapshot
from moe_router.placement import Placement
from moe_router.serving import router_pb2 as pb
from moe_router.serving.grpc_server import Adder
from moe_router.serving.matrices import from_matrix, to_matrix
from moe_router.serving.router_pb2_grpc import RouterServicer, add_RouterServicer_to_server

_WATCH_S = 1.0  # one wait for a new epoch: so long a lost service or a closing server may go unseen


class Gating(Protocol):
    """`GatingService` for an event loop; see there."""

    async def watch(self, after_epoch: int, timeout_s: float) -> Snapshot | None: ...
    async def heartbeat(self, rank: int) -> int: ...
    async def report_load(self, rank: int, epoch: int, load_LE: Tensor) -> None: ...
    async def route(
        self, model: str, layer: int, epoch: int, x_TD: Tensor, offsets_B1: Tensor | None
    ) -> Decision: ...


class InProcess:
    """A `GatingService` of this process; its calls run in threads, for they may wait."""

    def __init__(self, service: GatingService) -> None:
        self._service = service

    async def watch(self, after_epoch: int, timeout_s: float) -> Snapshot | None:
        return await asyncio.to_thread(self._service.watch, after_epoch, timeout_s)

    async def heartbeat(self, rank: int) -> int:
        return await asyncio.to_thread(self._service.heartbeat, rank)

    async def report_load(self, rank: int, epoch: int, load_LE: Tensor) -> None:
        await asyncio.to_thread(self._service.report_load, rank, epoch, load_LE)

    async def route(
        self, model: str, layer: int, epoch: int, x_TD: Tensor, offsets_B1: Tensor | None
    ) -> Decision:
        return await asyncio.to_thread(self._service.route, model, layer, epoch, x_TD, offsets_B1)


def router_adder(gating: Gating) -> Adder:
    """For `serve_grpc`: the service `Router` over `gating`."""
    return partial(add_RouterServicer_to_server, GatingFront(gating))


class GatingFront(RouterServicer):
    """The methods of `service Router`. Errors become status codes in `grpc_server`."""

    def __init__(self, gating: Gating) -> None:
        self._gating = gating
        self._waits: dict[int, asyncio.Future[Snapshot | None]] = {}  # by after_epoch

    async def WatchSnapshot(
        self, request: pb.WatchSnapshotRequest, context: Any
    ) -> AsyncIterator[pb.Snapshot]:
        after = request.after_epoch
        while True:
            found = await self._next(after)
            if found is not None:
                after = found.epoch
                yield snapshot_message(found, with_weights=request.with_weights)

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
        return _reply(decision)

    async def _next(self, after: int) -> Snapshot | None:
        """One wait for all streams that wait for the same: each would hold a thread."""
        wait = self._waits.get(after)
        if wait is None:
            wait = asyncio.ensure_future(self._gating.watch(after, _WATCH_S))
            self._waits[after] = wait
            wait.add_done_callback(lambda _: self._waits.pop(after))
        return await asyncio.shield(wait)  # a stream that ends must not end the others


def snapshot_message(snapshot: Snapshot, *, with_weights: bool) -> pb.Snapshot:
    """As the stream carries it; read back by `snapshot_of`."""
    ranks = [pb.Placement.Rank(experts=held) for held in snapshot.placement.experts_of_rank]
    return pb.Snapshot(
        epoch=snapshot.epoch,
        step=snapshot.step,
        placement=pb.Placement(experts=snapshot.placement.experts, ranks=ranks),
        capacity_factor=snapshot.capacity_factor,
        alive=snapshot.alive,
        load_LE=to_matrix(snapshot.load_LE),
        routers=[_router_message(router, with_weights) for router in snapshot.routers],
    )


def snapshot_of(message: pb.Snapshot) -> Snapshot:
    """What a client holds: with weights, `snapshot.routers[i].build()` is the Router itself.

    Raises:
        GatingError, ConfigError: the message is not what `snapshot_message` makes.
    """
    limited = message.HasField("capacity_factor")
    return Snapshot(
        epoch=message.epoch,
        step=message.step,
        placement=Placement(tuple(tuple(rank.experts) for rank in message.placement.ranks)),
        capacity_factor=message.capacity_factor if limited else None,
        routers=tuple(_router_of(router) for router in message.routers),
        alive=tuple(message.alive),
        load_LE=from_matrix(message.load_LE, "load_LE"),
    )


def _router_message(router: RouterWeights, with_weights: bool) -> pb.RouterWeights:
    return pb.RouterWeights(
        model=router.model,
        layer=router.layer,
        dim=router.dim,
        config_json=json.dumps(dataclasses.asdict(router.config)),
        safetensors=router.safetensors if with_weights else None,
    )


def _router_of(message: pb.RouterWeights) -> RouterWeights:
    try:
        config = RouterConfig(**json.loads(message.config_json))
    except (TypeError, json.JSONDecodeError) as error:
        raise GatingError(
            f"router {message.model}/{message.layer}: config_json: {error}; want the fields of "
            "model.moe; use the same version as the server"
        ) from error
    return RouterWeights(
        message.model, message.layer, message.dim, config, message.safetensors or None
    )


def _reply(decision: Decision) -> pb.RouteReply:
    choice = decision.choice
    return pb.RouteReply(
        epoch=decision.epoch,
        target_TK=to_matrix(choice.target_TK),
        weight_TK=to_matrix(choice.weight_TK),
        position_TK=to_matrix(decision.position_TK),
        capacity=decision.capacity,
        losses={name: float(loss) for name, loss in choice.losses.items()},
        rows_E=decision.plan.rows_G.tolist(),
    )
