"""A rank that kills or freezes itself at a point of the protocol, once."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import torch.distributed as dist

from benchmarks.fault_cases import POINTS, Fault
from moe_router.training import migrate
from moe_router.training.checkpoint_tensors import Snapshot
from moe_router.training.loop import Trainer
from moe_router.training.parallel import moe_layers
from moe_router_cluster.expert_shard import ExpertShard

_COLLECTIVES = ("all_to_all_single", "all_gather_into_tensor", "reduce_scatter_tensor")


def _beside(run_dir: Path) -> Path:
    """Where orders and marks lie: the run's own folder must not exist before it."""
    return run_dir.with_name(f"{run_dir.name}.fault")


def order(run_dir: Path, *faults: tuple[Fault, int]) -> None:
    """Have ranks strike: each fault at its point when so many steps are committed, in turn."""
    told = [
        {"point": fault.point, "step": step, "signal": int(fault.how), "ranks": list(fault.ranks)}
        | {"node": fault.victim == "node"}
        for fault, step in faults
    ]
    assert all(fault.point in POINTS for fault, _ in faults), told
    _beside(run_dir).mkdir(parents=True)
    (_beside(run_dir) / "orders.json").write_text(json.dumps(told))


def struck_at(run_dir: Path) -> float | None:
    """Unix seconds of the first strike; None while there was none."""
    marks = _beside(run_dir).glob("struck.*")
    return min((float(mark.read_text()) for mark in marks), default=None)


class FaultyShard(ExpertShard):
    """Strikes in the process that lives when the order is read; its successor obeys the next."""

    _order: dict[str, Any] | None = None
    _mark = Path()  # there once the order was obeyed

    def restore(self, step_dir: str | None) -> int:
        step = super().restore(step_dir)
        self._order = self._next()
        if self._order is not None:
            set_trap(self._ready(), self._order["point"], self._strike)
        return step

    def _next(self) -> dict[str, Any] | None:
        path = _beside(self._run_dir) / "orders.json"
        orders = json.loads(path.read_text()) if path.exists() else []
        for number, told in enumerate(orders):
            self._mark = path.with_name(f"struck.{number}.rank_{self._rank}")
            if self._rank in told["ranks"] and not self._mark.exists():
                return dict(told)
        return None

    def share(self, service: Any, epoch: int, step: int) -> None:
        if self._order is not None and self._order["point"] == "in a placement commit":
            self._strike()
        super().share(service, epoch, step)

    def _strike(self) -> None:
        told = self._order
        if told is None or self._ready().step < told["step"] or self._mark.exists():
            return
        if self._copier is not None:
            self._copier.wait()  # a replica on its way arrives: the run must come back with it
        self._mark.write_text(str(time.time()))
        if told["node"]:
            os.kill(os.getppid(), told["signal"])  # Ray's own process, which began all others
        os.kill(os.getpid(), told["signal"])


def set_trap(trainer: Trainer, point: str, strike: Callable[[], None]) -> None:
    """Call `strike` whenever this process comes to `point`."""
    layer = moe_layers(trainer.model)[-1]
    match point:
        case "before counts":
            layer.dispatcher = _Trap(layer.dispatcher, dispatch=strike)
        case "mid-dispatch":
            layer.dispatcher = _Trap(layer.dispatcher, between=strike)
        case "before combine":
            layer.dispatcher = _Trap(layer.dispatcher, combine=strike)
        case "in backward":
            weight: Any = next(layer.experts.parameters())  # its hooks have no types
            weight.register_hook(lambda grad: strike())
        case "in the optimizer step":  # the weights have changed, the step is not committed
            trainer._optimizer.register_step_post_hook(lambda *_: strike())
        case "while experts move":  # those of the first layer have
            moving: Any = migrate
            exchange, moved = moving.exchange, list[int]()

            def second(*args: Any) -> Any:
                moved.append(1)
                if len(moved) == 2:
                    strike()
                return exchange(*args)

            moving.exchange = second
        case "in a checkpoint write":  # the file is there, the checkpoint is not
            write = Snapshot.write

            def written(self: Snapshot, folder: Path) -> None:
                write(self, folder)
                strike()

            Snapshot.write = written  # type: ignore[method-assign]


def _nothing() -> None: ...


class _Trap:
    """A dispatcher that calls something on its way."""

    def __init__(
        self,
        inner: Any,
        dispatch: Callable[[], None] = _nothing,
        between: Callable[[], None] = _nothing,
        combine: Callable[[], None] = _nothing,
    ) -> None:
        self._inner = inner
        self._before, self._between, self._after = dispatch, between, combine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def dispatch(self, *args: Any, **named: Any) -> Any:
        self._before()
        with _SecondCollective(self._between):
            return self._inner.dispatch(*args, **named)

    def combine(self, *args: Any, **named: Any) -> Any:
        self._after()
        return self._inner.combine(*args, **named)


class _SecondCollective:
    """Counts have been exchanged, rows have not."""

    def __init__(self, then: Callable[[], None]) -> None:
        self._then, self._calls = then, 0

    def __enter__(self) -> None:
        self._before = {name: getattr(dist, name) for name in _COLLECTIVES}
        for name, function in self._before.items():
            setattr(dist, name, self._counted(function))

    def __exit__(self, *_: object) -> None:
        for name, function in self._before.items():
            setattr(dist, name, function)

    def _counted(self, function: Any) -> Any:
        def call(*args: Any, **named: Any) -> Any:
            self._calls += 1
            if self._calls == 2:
                self._then()
            return function(*args, **named)

        return call


_ray: Any = ray  # half of its functions have no types
FaultyShardActor = _ray.remote(max_concurrency=2, max_restarts=0, max_task_retries=0)(FaultyShard)
