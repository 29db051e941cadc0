"""What benchmarks.dense_routing trains: tasks, the settings of each row, how a model gets there.

Every model is trained on one rank, by the same Trainer as any run. What a routed model is compared
with had as many steps: `dense` what starts from it without further training, `dense/tuned` what is
tuned from it, `.../equal` is a smaller dense model that executes as many FLOPs per token.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.depth_measure import dense_flops
from moe_router.config import Config, RoutingConfig
from moe_router.config_file import load_config
from moe_router.training.checkpoint_files import latest_checkpoint
from moe_router.training.data import AnyDataset, Batch, load_dataset, val_batches
from moe_router.training.loop import Trainer

COUNTED = 512  # held-out sequences that FLOPs are taken over
SAVE_EVERY = 500  # steps: what an interrupted run loses


@dataclass(frozen=True, slots=True)
class Task:
    """Attributes:
    config: the file, and keys that the benchmark sets over it.
    steps, tune: of the first training, and of what is tuned from it.
    keeps: shares of tokens of each kind's rows; the headline row of a kind is its first one.
    blocks: which blocks are routed, of each kind.
    noun: what is classified.
    """

    config: str
    overrides: tuple[str, ...]
    steps: int
    tune: int
    keeps: dict[str, tuple[float, ...]]
    blocks: dict[str, dict[str, int]]
    noun: str


EVERY = {"every": 1, "first": 0}
TASKS = {
    "fashion": Task(
        "fashion", (), 2000, 400,
        {"prune": (0.6, 0.8), "merge": (0.75, 0.9, 0.8, 0.7, 0.6, 0.5)},
        {"prune": EVERY, "merge": EVERY}, "images",
    ),
    "sst2": Task(
        "sst2", ("train.eval_rows=872",), 600, 200,
        {"prune": (0.5, 0.3)}, {"prune": EVERY}, "sentences",
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Setting:
    """One row.

    Attributes:
        name: of the row, without its task.
        kind: "dense", "prune" or "merge".
        routing: None for a dense model.
        start: the row whose weights it begins with; None: its own first ones.
        steps: that it is trained.
        rival: the dense row that it is compared with.
        equal_to: the row whose executed FLOPs per token this smaller dense model has.
    """

    name: str
    kind: str
    routing: RoutingConfig | None
    start: str | None
    steps: int
    rival: str
    equal_to: str | None = None


def settings(task: Task) -> list[Setting]:
    """All rows of a task, each after those that it needs."""
    rows = [
        Setting("dense", "dense", None, None, task.steps, "dense"),
        Setting("dense/tuned", "dense", None, "dense", task.tune, "dense/tuned"),
    ]
    for kind, keeps in task.keeps.items():
        # merging learns nothing, so it is put into the dense model as it is
        tune, rival = (0, "dense") if kind == "merge" else (task.tune, "dense/tuned")
        for keep in keeps:
            routing = RoutingConfig(kind=kind, keep=keep, **task.blocks[kind])  # type: ignore[arg-type]
            name = f"{kind}/{keep}"
            variants = {name: routing}
            if keep == keeps[0]:
                variants[f"{name}/frozen"] = replace(routing, frozen=True)
                variants[f"{name}/position"] = replace(routing, router="position")
            rows += [Setting(n, kind, r, "dense", tune, rival) for n, r in variants.items()]
        if kind == "merge":
            tuned = RoutingConfig(kind=kind, keep=keeps[0], **task.blocks[kind])  # type: ignore[arg-type]
            rows.append(
                Setting(f"merge/{keeps[0]}/tuned", kind, tuned, "dense", task.tune, "dense/tuned")
            )
        head, steps = f"{kind}/{keeps[0]}", task.steps + tune
        rows.append(Setting(f"{head}/equal", "dense", None, None, steps, rival, head))
    return rows


class Bench:
    """The runs of one task: trained once, kept in a folder, gone on with after an interruption.

    Args:
        name: in TASKS.
        folder: of the runs.
        overrides: keys of the config set from outside: the data's path, sizes.
        device: of the models.
    """

    def __init__(self, name: str, folder: Path, overrides: Sequence[str], device: str) -> None:
        self.name, self.task, self.device = name, TASKS[name], device
        self._folder = folder
        own = ["cluster.actors=1", "run.record=false"]
        self._base = load_config(self.task.config, [*self.task.overrides, *own, *overrides])
        self.dataset: AnyDataset = load_dataset(self._base.data)

    def config(self, setting: Setting, seed: int, flops: float | None = None) -> Config:
        """Of one run.

        Args:
            flops: executed per token, for the dense model that has as many.
        """
        base = self._base
        run = replace(base.run, name=self._run(setting.name, seed), seed=seed)
        train = replace(base.train, steps=max(setting.steps, 1))
        if setting.start is not None:
            run = replace(run, seed=seed + 1000)  # other batches than those it began with
            warmup = min(train.warmup, setting.steps // 10)
            train = replace(train, lr=train.lr / 2, warmup=warmup)
        config = replace(
            base, run=run, train=train, model=replace(base.model, routing=setting.routing)
        )
        return config if flops is None else equal_flops(config, flops, self.counted())

    def batch(self, rows: int) -> Batch:
        """The first held-out sequences."""
        batches = val_batches(self.dataset, rows=rows, batch=rows, rank=0, ranks=1)
        return next(batches).to(torch.device(self.device))

    def counted(self) -> list[Batch]:
        """What FLOPs are taken over."""
        return [self.batch(COUNTED)]

    def trained(self, setting: Setting, seed: int, flops: float | None = None) -> Trainer:
        """A trainer whose model has had its steps."""
        config = self.config(setting, seed, flops)
        trainer = Trainer(config, device=self.device, dataset=self.dataset)
        if setting.start is not None:
            self._begin_with(trainer, setting.start, seed)
        folder = self._folder / config.run.name
        if setting.steps and (last := latest_checkpoint(folder)) is not None:
            trainer.restore(last)
        folder.mkdir(parents=True, exist_ok=True)
        while trainer.step < setting.steps:
            trainer.train_step()
            if trainer.step % SAVE_EVERY == 0 or trainer.step == setting.steps:
                trainer.save(folder, wait=True)
        trainer.close()
        return trainer

    def _begin_with(self, trainer: Trainer, start: str, seed: int) -> None:
        before = next(s for s in settings(self.task) if s.name == start)
        weights = self.trained(before, seed).model.state_dict()
        missing, unexpected = trainer.model.load_state_dict(weights, strict=False)
        strange = [name for name in missing if "router" not in name]
        assert not strange and not unexpected, (strange, unexpected)

    def _run(self, name: str, seed: int) -> str:
        return f"{self.name}-{name.replace('/', '-')}-s{seed}"


def equal_flops(config: Config, flops: float, batches: list[Batch]) -> Config:
    """A dense model of as many layers, narrower in dim and hidden alike, that executes as many
    FLOPs per token on these sequences."""
    model = config.model

    def off(tried: Config) -> float:
        return abs(dense_flops(tried, batches) / flops - 1)

    def narrow(dim: int, hidden: int) -> Config:
        return replace(config, model=replace(model, dim=dim, hidden=hidden, routing=None))

    step = 4 * model.heads  # dims that heads can be cut of, and turned in two dimensions
    best = narrow(step, step)
    for dim in range(step, model.dim + 1, step):
        for hidden in range(dim, 4 * dim + 1, 8):
            proportion = hidden / dim / (model.hidden / model.dim)
            tried = narrow(dim, hidden)
            if 0.75 <= proportion <= 1.33 and off(tried) < off(best):
                best = tried
    return best


def quality(trainer: Trainer) -> float:
    """Share of the held-out labels that is right."""
    record: Any = trainer.evaluate()
    accuracy: float = record.accuracy
    return accuracy


def one_thread() -> None:
    """Small products are slower on several threads of a busy machine, and not repeatable."""
    torch.set_num_threads(1)
