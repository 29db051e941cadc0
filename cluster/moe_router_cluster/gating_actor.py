"""The gating service as a named actor, and the ends that others hold of it.

It is made by the run that trains (`agreement`), found by name by whoever serves (`RayGating`), and
no training depends on it: ranks send and never wait. Ray starts a lost one again with what it kept
in the run's folder; where that is behind or gone, rank 0 publishes the present epoch once more.
"""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch import Tensor

from moe_router.config import ClusterConfig, Config
from moe_router.errors import ClusterError, MoeRouterError, StaleEpochError
from moe_router.gating import GatingService
from moe_router.gating_records import Load, Snapshot
from moe_router.gating_route import Decision
from moe_router.gating_state import last_epoch
from moe_router_cluster.resources import actor_environment

_ray: Any = ray  # half of its functions have no types
NAMESPACE = "moe_router"
_ANSWER_S = 30.0  # then a service that does not answer counts as gone
_START_S = 5.0  # for one that was there before this run; training does not wait for more

# num_cpus=0: it must not take a core that a rank was promised. Waiting and routing have threads of
# their own, so that reports, in the default group of one, never stand behind them.
GatingActor = _ray.remote(
    num_cpus=0,
    max_restarts=-1,
    max_task_retries=0,
    concurrency_groups={"watch": 8, "route": 2},
)(GatingService)


def start_gating(run: str, cluster: ClusterConfig, folder: Path | None = None) -> Any:
    """The actor `gating:RUN` of this cluster; made if there is none. Returns its handle at once.

    Args:
        folder: where it keeps its state; on this node, where it lives if it can.
    """
    environment = {**actor_environment(cluster, "cpu"), "OMP_NUM_THREADS": "1"}
    return GatingActor.options(
        name=_name(run),
        namespace=NAMESPACE,
        get_if_exists=True,
        runtime_env={"env_vars": environment},
        scheduling_strategy=NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=True
        ),
    ).remote(heartbeat_timeout_s=cluster.timeout_s, folder=folder)


def find_gating(run: str) -> Any:
    """The handle of the actor `gating:RUN`.

    Raises:
        ClusterError: there is none in this Ray cluster.
    """
    try:
        return ray.get_actor(_name(run), namespace=NAMESPACE)
    except ValueError:
        raise ClusterError(
            f"{_name(run)}: no such actor in this Ray cluster; it lives while the run trains"
        ) from None


def _name(run: str) -> str:
    return f"gating:{run}"


class Agreement:
    """The supervisor's end: counts the epochs of a run.

    Args:
        config: of the run.
        ask: a method of every rank; see `ShardGroup.ask`.
    """

    def __init__(self, config: Config, ask: Callable[..., list[Any]]) -> None:
        self._config, self._ask = config, ask
        self._service: Any = None
        self._epoch = 0

    def agree(self, step: int) -> int:
        """Begin an epoch at a step to which every rank can come back. Raises as `ask` does.

        Returns:
            The epoch; 0 of a model that has no experts.
        """
        if self._config.model.moe is None:
            return 0
        run = self._config.run.name
        folder = Path(self._config.run.dir).absolute() / run / "gating"
        with suppress(RayError):  # training goes on without it, and asks again next time
            if self._service is None:
                self._epoch = max(_last_epoch(run), last_epoch(folder))
            found = start_gating(run, self._config.cluster, folder)
            # the handle that made it keeps it alive; one that found it does not
            if self._service is None or found._actor_id != self._service._actor_id:
                self._service = found
        if self._service is not None:
            self._epoch += 1
            self._ask("share", self._service, self._epoch, step)
        return self._epoch

    def close(self) -> None:
        """End the service of a run that has ended."""
        if self._service is not None:
            with suppress(RayError):  # it is gone, which is what was wanted
                ray.kill(self._service, no_restart=True)
            self._service = None


def _last_epoch(run: str) -> int:
    """Of a service that was there before; 0 if there was none, or it does not answer."""
    try:
        found: Snapshot | None = ray.get(find_gating(run).watch.remote(0, 0.0), timeout=_START_S)
    except (ClusterError, GetTimeoutError):
        return 0
    return 0 if found is None else found.epoch


class Reporter:
    """A rank's end: sends one message at a time and never waits, whatever became of the service.

    Args:
        service: handle of the actor.
        agreed: arguments of `GatingService.publish`; from rank 0, None from the others.
    """

    def __init__(
        self, service: Any, rank: int, epoch: int, agreed: dict[str, Any] | None = None
    ) -> None:
        self._service, self._rank, self._epoch = service, rank, epoch
        self._agreed = agreed
        self._sent: Any = None
        if agreed is not None:
            self._send(service.publish, **agreed)

    def report(self, load_LE: Tensor) -> None:
        """Load of this rank's tokens, (L, E); dropped while the message before is on its way."""
        if self._sent is not None and not ray.wait([self._sent], timeout=0)[0]:
            return
        unknown = self._was_unknown()
        if unknown and self._agreed is not None:
            self._send(self._service.publish, **self._agreed)  # it has started again, empty
        else:
            self._send(self._service.report_load, self._rank, self._epoch, load_LE.cpu().float())

    def _send(self, method: Any, *args: Any, **named: Any) -> None:
        self._sent = None
        with suppress(RayError):  # a lost report costs nothing
            self._sent = method.remote(*args, **named)

    def _was_unknown(self) -> bool:
        if self._sent is None:
            return False
        try:
            ray.get(self._sent)
        except StaleEpochError:
            return True
        except RayError:
            return False  # the service is away, or a message of ours was wrong: no reason to stop
        return False


class RayGating:
    """The service of a run, for an event loop: what `moe_router.serving.grpc_router` asks for.

    Every method raises what `GatingService` raises, and ClusterError where it is gone.
    """

    def __init__(self, run: str) -> None:
        self._run = run
        self._known: Any = None  # a lost one that Ray starts again keeps its handle

    async def load(self) -> Load:
        found: Load = await self._answer(self._actor().load.remote())
        return found

    async def watch(self, after_epoch: int, timeout_s: float) -> Snapshot | None:
        watch = self._actor().watch.options(concurrency_group="watch")
        found: Snapshot | None = await self._answer(watch.remote(after_epoch, timeout_s))
        return found

    async def heartbeat(self, rank: int) -> int:
        return int(await self._answer(self._actor().heartbeat.remote(rank)))

    async def report_load(self, rank: int, epoch: int, load_LE: Tensor) -> None:
        await self._answer(self._actor().report_load.remote(rank, epoch, load_LE))

    async def route(
        self, model: str, layer: int, epoch: int, x_TD: Tensor, offsets_B1: Tensor | None
    ) -> Decision:
        route = self._actor().route.options(concurrency_group="route")
        decision: Decision = await self._answer(route.remote(model, layer, epoch, x_TD, offsets_B1))
        return decision

    def _actor(self) -> Any:
        if self._known is None:
            self._known = find_gating(self._run)
        return self._known

    async def _answer(self, ref: Any) -> Any:
        try:
            return await asyncio.wait_for(asyncio.wrap_future(ref.future()), _ANSWER_S)
        except RayTaskError as error:
            if isinstance(error.cause, MoeRouterError):
                raise error.cause from None
            raise
        except (RayActorError, TimeoutError) as error:
            self._known = None  # a run that starts again makes another
            raise ClusterError(f"{_name(self._run)}: gone or frozen; ask again later") from error
