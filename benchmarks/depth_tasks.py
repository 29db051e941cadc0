"""What benchmarks.dense_routing trains: tasks, and the settings of each row.

What a routed model is compared with had as many steps: `dense` what starts from it without further
training, `dense/tuned` what is tuned from it, `.../equal` is a smaller dense model that executes as
many FLOPs per token.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from moe_router.config import RoutingConfig


@dataclass(frozen=True, slots=True)
class Task:
    """Attributes:
    config: the file, and keys that the benchmark sets over it.
    steps, tune: of the first training, and of what is tuned from it.
    routings: by the name of the row, whose first part is its kind; the headline row of a kind is
        its first one.
    noun: what a sequence is.
    metric: of an EvalRecord.
    on_gpu: keys set on a GPU alone, which idles on a model that a CPU can train.
    """

    config: str
    overrides: tuple[str, ...]
    steps: int
    tune: int
    routings: dict[str, RoutingConfig]
    noun: str
    metric: str = "accuracy"
    on_gpu: tuple[str, ...] = ()


def _shares(kind: str, keeps: Sequence[float], **more: Any) -> dict[str, RoutingConfig]:
    """Rows named by the share of tokens that stay, or of FLOPs that are executed."""
    blocks = {"every": 1, "first": 0} | more
    key = "budget" if kind in ("halt", "leap") else "keep"
    name = more.get("halting", kind)
    return {f"{name}/{k}": RoutingConfig(kind=kind, **{key: k}, **blocks) for k in keeps}  # type: ignore[arg-type]


# gates that begin nearly open, so that tuning goes on from the dense model
_GATE = {"router": "mlp", "router_hidden": 32, "threshold": 0.5, "start": -4.0}
TSA = {"halting": "tsa", **_GATE}
PONDER = {"halting": "ponder", "threshold": 0.9, "start": -2.0, "prior": 0.3}
# kinds that learn from the beginning: in them a block counts by what a router says of the token, of
# which a dense model knows nothing
ANEW = ("skip", "mod", "tsa")
_TSA_SHARE = _shares("halt", (0.8,), **TSA, curriculum=100)
_FREE = {"tsa/free": RoutingConfig(kind="halt", every=1, first=0, **TSA)}  # type: ignore[arg-type]
# as in its paper: every second block, one token in eight
MOD = {"mod/0.125": RoutingConfig(kind="skip", keep=0.125, every=2, first=1)}
_CIFAR = (
    "data.image={size: 32, channels: 3, patch: 4}", "data.seq_len=64", "train.eval_rows=1000",
    "data.labels=[airplane, automobile, bird, cat, deer, dog, frog, horse, ship, truck]",
)  # fmt: skip
_ENWIK8 = ("data.source=enwik8", "train.eval_rows=256")
_IMDB = ("train.eval_rows=2000", "data.seq_len=512", "train.batch=16")
_COLA = ("train.eval_rows=2000", "data.seq_len=64")
# as in the paper of token-selective attention
_TSA = (
    "model.layers=6", "model.dim=256", "model.heads=4", "model.kv_heads=2", "model.hidden=1024",
    "model.moe=null",
)  # fmt: skip
_WIDE = ("model.layers=6", "model.dim=256", "model.hidden=1024", "train.batch=32")
# from free to where next to nothing is computed; routers begin undecided, for few steps must do
_LEAP = _shares("leap", (0.5, 0.25, 0.1, 0.04), start=-0.5, curriculum=50)
_CASCADE = {
    f"{kind}-first{first}/0.5": routing
    for kind in ("prune", "skip", "leap")
    for first in (0, 1, 2)
    for routing in _shares(kind, (0.5,), first=first).values()
}
TASKS = {
    "fashion": Task(
        "fashion", (), 2000, 400,
        _shares("prune", (0.6, 0.8)) | _shares("merge", (0.75, 0.9, 0.8, 0.7, 0.6, 0.5)), "images",
    ),
    "cifar": Task(
        "fashion", _CIFAR, 300, 100,
        _shares("prune", (0.8,)) | _shares("merge", (0.8, 0.7)), "images",
    ),
    "sst2": Task(
        "sst2", ("train.eval_rows=872",), 600, 200, _shares("prune", (0.5, 0.3)), "sentences",
    ),
    "imdb": Task(
        "sst2", _IMDB, 300, 100,
        _shares("prune", (0.3, 0.5)) | _shares("halt", (0.25, 0.15)) | _LEAP,
        "reviews", on_gpu=_WIDE,
    ),
    "enwik8": Task(
        "skip", _ENWIK8, 300, 150,
        MOD | _shares("skip", (0.5,))
        | _shares("leap", (0.5,), curriculum=100) | _shares("halt", (0.6,))
        | _shares("halt", (0.6,), **PONDER) | _TSA_SHARE | _FREE,
        "rows of 128 bytes", "bits_per_byte",
    ),
    "shakespeare": Task(
        "shakespeare", _TSA, 600, 200, _TSA_SHARE | _FREE,
        "rows of 256 bytes", "bits_per_byte",
    ),
    "cola": Task(
        "sst2", _COLA, 600, 200, _shares("prune", (0.5,)) | _shares("halt", (0.5,)), "sentences",
        "matthews",
    ),
    # what an error costs that is made early: the first block after or at which tokens go
    "cascade": Task("sst2", _IMDB, 300, 100, _CASCADE, "reviews"),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Setting:
    """One row.

    Attributes:
        name: of the row, without its task.
        routing: None for a dense model.
        start: the row whose weights it begins with; None: its own first ones.
        steps: that it is trained.
        rival: the dense row that it is compared with.
        equal_to: the row whose executed FLOPs per token this smaller dense model has.
    """

    name: str
    routing: RoutingConfig | None
    start: str | None
    steps: int
    rival: str
    equal_to: str | None = None

    @property
    def thresholds(self) -> bool:
        """Whether its tokens leave at a threshold that can be softened."""
        routing = self.routing
        return routing is not None and routing.kind == "halt" and routing.halting != "act"


def scaled(task: Task, scale: float) -> Task:
    """As many times the steps."""
    return replace(task, steps=round(scale * task.steps), tune=round(scale * task.tune))


def settings(task: Task) -> list[Setting]:
    """All rows of a task, each after those that it needs."""
    rows = [
        Setting("dense", None, None, task.steps, "dense"),
        Setting("dense/tuned", None, "dense", task.tune, "dense/tuned"),
    ]
    seen = set()
    for name, routing in task.routings.items():
        kind = name.partition("/")[0]
        # merging learns nothing, so it is put into the dense model as it is
        tune, rival = (0, "dense") if kind == "merge" else (task.tune, "dense/tuned")
        variants = {name: routing}
        curve = task.routings is _CASCADE  # compared with each other
        if kind not in seen and not curve:
            variants[f"{name}/frozen"] = replace(routing, frozen=True)
            variants[f"{name}/position"] = replace(routing, router="position")
        anew = kind in ANEW
        start, steps = (None, task.steps + tune) if anew else ("dense", tune)
        rows += [Setting(n, r, start, steps, rival) for n, r in variants.items()]
        if kind not in seen and not curve:
            if kind in ("merge", "tsa"):
                rows.append(Setting(f"{name}/tuned", routing, "dense", task.tune, "dense/tuned"))
            rows.append(Setting(f"{name}/equal", None, None, task.steps + tune, rival, name))
        seen.add(kind)
    return rows
