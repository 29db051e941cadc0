"""The Ray Serve application: an engine that owns a ShardGroup, and its HTTP and gRPC fronts.

`build` is what `cluster/serve.yaml` names; `moe-router serve` builds the same application.
"""

import asyncio
import os
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import FastAPI
from ray import serve

from moe_router.config import Config
from moe_router.errors import ClusterError
from moe_router.gating import GatingService
from moe_router.placement import Placement
from moe_router.serving.demo import add_page
from moe_router.serving.engine import Engine
from moe_router.serving.grpc_generation import generation_adder
from moe_router.serving.grpc_router import Gating, InProcess, router_adder
from moe_router.serving.grpc_server import serve_grpc
from moe_router.serving.openai import make_app
from moe_router.serving.requests import Ask, Facts, Health, Piece
from moe_router.training.data import load_tokenizer
from moe_router_cluster.gating_actor import RayGating, find_gating
from moe_router_cluster.remote_engine import RemoteEngine
from moe_router_cluster.resources import actor_environment
from moe_router_cluster.serve_plan import ServeArguments, ServePlan, make_plan
from moe_router_cluster.serving_group import ServingGroup

_serve: Any = serve  # its decorators have no types
_DRAIN_S = 120.0  # for what an engine has accepted, when another is deployed in its place
_MAKING_S = 600.0  # an engine: placing actors, importing torch, reading a checkpoint
_MANY = 10_000  # calls at once: the engine's own queue says when it is full


class EngineReplica:
    """Owns the ranks. One replica is one ShardGroup; more of them share nothing."""

    async def __init__(self, plan: ServePlan) -> None:  # type: ignore[misc]  # Serve awaits it
        if os.path.isdir(plan.folder):
            os.chdir(plan.folder)
        tokenizer = load_tokenizer(plan.config.data.tokenizer)
        self._group = ServingGroup(plan.config, plan.step_dir)
        try:
            await asyncio.to_thread(self._group.start)
        except BaseException:
            self._group.close()
            raise
        self._facts = facts_of(plan.config, plan.model)
        self._engine = Engine(self._group, tokenizer, plan.model, plan.config.serve)
        await self._engine.__aenter__()

    async def stream(self, ask: Ask) -> AsyncGenerator[Piece]:
        async for piece in self._engine.stream(ask):
            yield piece

    async def health(self) -> Health:
        return await self._engine.health()

    async def metrics(self) -> str:
        return await self._engine.metrics()

    async def facts(self) -> Facts:
        return self._facts

    async def kill(self, rank: int) -> None:
        await self._group.kill(rank)

    async def routers(self) -> dict[str, Any]:
        return await asyncio.to_thread(self._group.routers)

    async def check_health(self) -> None:
        """Serve makes this replica anew where it raises; lost ranks alone are the engine's."""
        await self._engine.check()

    async def __del__(self) -> None:
        if hasattr(self, "_engine"):
            await self._engine.__aexit__()
            await asyncio.to_thread(self._group.close)


class HttpFront:
    """Args:
    engine: handle of the EngineReplica.
    grpc: of the GrpcFront, named here so that Serve starts it too.
    """

    def __init__(self, engine: Any, grpc: Any, plan: ServePlan) -> None:
        self._engine, self._grpc = RemoteEngine(engine, plan.model), grpc
        self._plan = plan

    def __serve_build_asgi_app__(self) -> FastAPI:
        app = make_app(self._engine, self._plan.token)
        if self._plan.page:
            add_page(app, self._engine, chaos=self._plan.chaos)
        return app

    async def grpc_port(self) -> int:
        return int(await self._grpc.port.remote())


class GrpcFront:
    """A server of its own: that of Ray Serve has no TLS and listens on every interface."""

    async def __init__(self, engine: Any, plan: ServePlan) -> None:  # type: ignore[misc]
        adders = [
            generation_adder(RemoteEngine(engine, plan.model)),
            router_adder(await _gating(engine, plan.model)),
        ]
        self._server, self._port = await serve_grpc(
            adders,
            host=plan.host,
            port=plan.grpc_port,
            token=plan.token,
            tls=plan.tls,
            insecure=plan.insecure,
        )

    async def port(self) -> int:
        return self._port

    async def __del__(self) -> None:
        if hasattr(self, "_server"):
            await self._server.stop(1.0)


def facts_of(config: Config, name: str) -> Facts:
    """What the page shows of a model, by its config."""
    model, ranks = config.model, config.cluster.actors
    moe, depth = model.moe, model.routing
    experts = [moe.experts if moe and model.is_moe(i) else 0 for i in range(model.layers)]
    homes: list[tuple[int, ...]] = []
    if moe is not None:
        held = Placement.contiguous(moe.experts, ranks).experts_of_rank
        homes = [
            tuple(rank for rank, of in enumerate(held) if expert in of)
            for expert in range(moe.experts)
        ]
    return Facts(name, tuple(experts), tuple(homes), ranks, depth.kind if depth else "")


async def _gating(engine: Any, run: str) -> Gating:
    """The service of the run if it still trains in this cluster, else one of the served model."""
    try:
        find_gating(run)
    except ClusterError:
        service = GatingService()
        service.publish(**await engine.routers.remote())
        return InProcess(service)
    return RayGating(run)


def application(plan: ServePlan) -> Any:
    """The three deployments, bound to each other."""
    environment = {"PYTHONPATH": actor_environment(plan.config.cluster, "cpu")["PYTHONPATH"]}
    # no CPU: those of the cluster are for the ranks
    actor = {"num_cpus": 0, "runtime_env": {"env_vars": environment}}
    common = {
        "ray_actor_options": actor,
        "max_ongoing_requests": _MANY,
        "max_constructor_retry_count": 1,
        "graceful_shutdown_wait_loop_s": 0.5,
    }
    engine = _serve.deployment(
        EngineReplica,
        **common,
        graceful_shutdown_timeout_s=_DRAIN_S,
        health_check_period_s=2,
        # a frozen rank takes cluster.timeout_s to tell; till then the replica itself is well
        health_check_timeout_s=plan.config.cluster.timeout_s + 30,
    )
    grpc = _serve.deployment(GrpcFront, **common, graceful_shutdown_timeout_s=5)
    # a front takes no resources: the next one stands before the old one goes, which waits for the
    # answers that it passes on, from an engine that may still be in the making
    http = _serve.deployment(
        _serve.ingress()(HttpFront),
        **common,
        graceful_shutdown_timeout_s=_DRAIN_S + _MAKING_S,
        max_surge_percent=100,
    )
    bound = engine.bind(plan)
    return http.bind(bound, grpc.bind(bound, plan), plan)


def build(args: dict[str, Any]) -> Any:
    """For `serve deploy`. Raises MoeRouterError as `make_plan`."""
    return application(make_plan(ServeArguments.of(args)))
