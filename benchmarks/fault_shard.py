"""A rank that kills or freezes itself at a point of the protocol, once."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import torch.distributed as dist

from moe_router.training.checkpoint_tensors import Snapshot
from moe_router.training.loop import Trainer
from moe_router.training.parallel import moe_layers
from moe_router_cluster.expert_shard import ExpertShard

POINTS = (
    "before counts",
    "mid-dispatch",
    "before combine",
    "in backward",
    "in the optimizer step",
    "in a placement commit",
    "in a checkpoint write",
)
_COLLECTIVES = ("all_to_all_single", "all_gather_into_tensor", "reduce_scatter_tensor")


def _beside(run_dir: Path) -> Path:
    """Where orders and marks lie: the run's own folder must not exist before it."""
    return run_dir.with_name(f"{run_dir.name}.fault")


def order(run_dir: Path, point: str, step: int, how: signal.Signals, ranks: list[int]) -> None:
    """Have these ranks strike at `point`, when `step` steps are committed."""
    assert point in POINTS, point
    _beside(run_dir).mkdir(parents=True)
    told = {"point": point, "step": step, "signal": int(how), "ranks": ranks}
    (_beside(run_dir) / "order.json").write_text(json.dumps(told))


def struck_at(run_dir: Path) -> float | None:
    """Unix seconds of the first strike; None while there was none."""
    marks = _beside(run_dir).glob("struck.rank_*")
    return min((float(mark.read_text()) for mark in marks), default=None)


class FaultyShard(ExpertShard):
    """Strikes in the process that lives when the order is read; its successor does not."""

    _order: dict[str, Any] | None = None

    def restore(self, step_dir: str | None) -> int:
        step = super().restore(step_dir)
        path = _beside(self._run_dir) / "order.json"
        told = json.loads(path.read_text()) if path.exists() else None
        mine = told is not None and self._rank in told["ranks"] and not self._mark().exists()
        self._order = told if mine else None
        if self._order is not None:
            set_trap(self._ready(), self._order["point"], self._strike)
        return step

    def share(self, service: Any, epoch: int, step: int) -> None:
        if self._order is not None and self._order["point"] == "in a placement commit":
            self._strike()
        super().share(service, epoch, step)

    def _mark(self) -> Path:
        return _beside(self._run_dir) / f"struck.rank_{self._rank}"

    def _strike(self) -> None:
        told = self._order
        if told is None or self._ready().step < told["step"] or self._mark().exists():
            return
        if self._copier is not None:
            self._copier.wait()  # a replica on its way arrives: the run must come back with it
        self._mark().write_text(str(time.time()))
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
