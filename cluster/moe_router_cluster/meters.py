"""The numbers of a run as Ray metrics, which every node offers to Prometheus as `ray_<name>`.

`cluster/dashboards/moe_router.json` draws them. All are set by the process that supervises the
run, from records of all ranks together; those that are rank 0's own say so.
"""

from collections.abc import Mapping
from typing import Any

from ray.util.metrics import Counter, Gauge

from moe_router.config import Config
from moe_router.cost import cost, peak_flops
from moe_router.observability.metrics import imbalance
from moe_router.observability.records import EvalRecord, StepRecord
from moe_router_cluster.course import Recovery

_BACKWARD = 3  # forward + backward, over forward

GAUGES = {
    "step": "optimizer steps committed",
    "epoch": "of what the ranks share: placement, capacity, routers",
    "loss": "mean cross-entropy, nats per token",
    "grad_norm": "global L2 norm before clipping",
    "tokens_per_second": "by the wall clock, all ranks together",
    "mfu": "matrix-product FLOPs of the model per second, over the devices' dense bf16 peak",
    "dispatch_microseconds": "dispatch and combine of one forward pass on rank 0, all layers",
    "dispatch_bytes": "hidden states that a forward pass brought to rank 0's experts",
    "held_out_loss": "nats, at the last evaluation",
}
COUNTERS = {
    "tokens": "trained on, replayed ones included",
    "rows": "choices that asked for a row",
    "dropped": "choices that got none: their expert was full",
    "recoveries": "losses of actors that the run came back from",
    "recovery_seconds": "from each loss until every rank stood at a common step again",
}
BY_LAYER = {"imbalance": "largest over mean load of a layer's experts in the last step"}
BY_EXPERT = {"expert_rows": "choices of an expert in the last step"}
BY_LOSS = {"routing_loss": "unscaled, mean over its routers"}


class Meters:
    """An `Observer` that sets Ray metrics.

    Args:
        vocab: ids of the tokenizer; with the config it says what a token costs.
        device: name of what each rank computes on.
    """

    def __init__(self, config: Config, vocab: int, device: str) -> None:
        self._run = config.run.name
        peak = peak_flops(device)
        per_token = _BACKWARD * cost(config, vocab).flops
        self._mfu_of_one = None if peak is None else per_token / (peak * config.cluster.actors)
        self._gauges = {name: self._gauge(name, what) for name, what in GAUGES.items()}
        self._by = {
            **{name: self._gauge(name, what, "layer") for name, what in BY_LAYER.items()},
            **{
                name: self._gauge(name, what, "layer", "expert") for name, what in BY_EXPERT.items()
            },
            **{name: self._gauge(name, what, "loss") for name, what in BY_LOSS.items()},
        }
        self._counters = {
            name: Counter(_named(name), description=what, tag_keys=("run",))
            for name, what in COUNTERS.items()
        }

    def agreed(self, epoch: int, step: int) -> None:
        self._set({"epoch": epoch, "step": step})

    def stepped(self, records: list[StepRecord], seconds: float) -> None:
        last = records[-1]
        speed = sum(record.tokens for record in records) / max(seconds, 1e-9)
        self._set(
            {
                "step": last.step,
                "loss": last.loss,
                "grad_norm": last.grad_norm,
                "tokens_per_second": speed,
                "mfu": None if self._mfu_of_one is None else speed * self._mfu_of_one,
                "dispatch_microseconds": last.dispatch_us,
                "dispatch_bytes": last.dispatch_bytes,
            }
        )
        for name in ("tokens", "rows", "dropped"):
            self._count(name, sum(getattr(record, name) for record in records))
        for loss, value in last.losses.items():
            self._by["routing_loss"].set(value, self._tags(loss=loss))
        for layer, load_E in enumerate(last.load_LE):
            self._load(layer, load_E)

    def evaluated(self, record: EvalRecord) -> None:
        self._set({"held_out_loss": record.loss})

    def recovered(self, recovery: Recovery) -> None:
        self._count("recoveries", 1.0)
        self._count("recovery_seconds", recovery.seconds)
        self._set({"step": recovery.from_step})

    def _load(self, layer: int, load_E: list[int]) -> None:
        worst = imbalance([load_E])
        if worst is not None:
            self._by["imbalance"].set(worst, self._tags(layer=layer))
        for expert, rows in enumerate(load_E):
            self._by["expert_rows"].set(rows, self._tags(layer=layer, expert=expert))

    def _set(self, values: Mapping[str, float | None]) -> None:
        for name, value in values.items():
            if value is not None:
                self._gauges[name].set(value, self._tags())

    def _count(self, name: str, more: float) -> None:
        if more > 0:  # Ray's counters refuse 0
            self._counters[name].inc(more, self._tags())

    def _tags(self, **more: object) -> dict[str, str]:
        return {"run": self._run} | {name: str(value) for name, value in more.items()}

    @staticmethod
    def _gauge(name: str, what: str, *tags: str) -> Any:
        return Gauge(_named(name), description=what, tag_keys=("run", *tags))


def _named(name: str) -> str:
    return f"moe_router_{name}"
