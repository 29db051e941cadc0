"""The runs of benchmarks.dense_routing: how a model of a row comes to be, and how good it is.

Every model is trained on one rank, by the same Trainer as any run.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.depth_measure import dense_flops, executed
from benchmarks.depth_tasks import TASKS, Setting, scaled, settings
from benchmarks.results import Row
from benchmarks.timing import Deadline
from moe_router import Context, Ledger
from moe_router.config import Config
from moe_router.config_file import load_config
from moe_router.models import CausalLM, Classifier
from moe_router.routing.depth import Shifted
from moe_router.training.calibrate import FAR, HALVINGS
from moe_router.training.checkpoint_files import latest_checkpoint
from moe_router.training.data import AnyDataset, Batch, load_dataset, val_batches
from moe_router.training.loop import Trainer

COUNTED = 128  # held-out sequences that FLOPs are taken over
SAVE_EVERY = 500  # steps: what an interrupted run loses


class TimeOver(Exception):
    """A training was not begun, or stands at a checkpoint, because its time was over."""


class Bench:
    """The runs of one task: trained once, kept in a folder, gone on with after an interruption.

    Args:
        name: in TASKS.
        folder: of the runs.
        overrides: keys of the config set from outside: the data's path, sizes.
        device: of the models.
        scale: of the number of steps.
        until: nothing is trained after it.
        elsewhere: a file of labelled texts from somewhere else, to be measured on too.
        dataset: of the task, if it was read before.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        overrides: Sequence[str],
        device: str,
        *,
        scale: float = 1.0,
        until: Deadline | None = None,
        elsewhere: Path | None = None,
        dataset: AnyDataset | None = None,
    ) -> None:
        self.name, self.task, self.device = name, scaled(TASKS[name], scale), device
        self._folder, self._until = folder, until
        own = ["cluster.actors=1", "run.record=false"]
        if device == "cuda":
            own += ["train.precision=bf16", *self.task.on_gpu]
        self._base = load_config(self.task.config, [*self.task.overrides, *own, *overrides])
        self.dataset: AnyDataset = dataset or load_dataset(self._base.data)
        self._elsewhere: AnyDataset | None = None
        if elsewhere is not None:
            there = replace(self._base.data, path=str(elsewhere), val_path=str(elsewhere))
            self._elsewhere = load_dataset(there)

    @property
    def about(self) -> Row:
        """What has to be the same of all seeds of a row."""
        base = self._base
        return {
            "steps": self.task.steps, "tune": self.task.tune, "tokens": base.data.seq_len,
            "batch": base.train.batch, "rows": self.dataset.train.rows,
        }  # fmt: skip

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
        trainer = self._begun(config, setting, seed)
        routing = setting.routing
        if routing is not None and routing.frozen and routing.budget is not None:
            trainer = self._begun(self._meeting_budget(config, trainer), setting, seed)
        folder = self._folder / config.run.name
        if setting.steps and (last := latest_checkpoint(folder)) is not None:
            trainer.restore(last)
        folder.mkdir(parents=True, exist_ok=True)
        while trainer.step < setting.steps:
            if self._until is not None and self._until.over():
                raise TimeOver(f"{config.run.name}: at step {trainer.step} of {setting.steps}")
            trainer.train_step()
            if trainer.step % SAVE_EVERY == 0 or trainer.step == setting.steps:
                trainer.save(folder, wait=True)
        trainer.close()
        return trainer

    def measured(self, setting: Setting, seed: int) -> Row:
        """Quality of one run, which is trained if it was not; measured once.

        Returns:
            `quality`; `executed`, its share of the dense model's FLOPs; `gap`, nats from soft to
            hard; both of the held-out data elsewhere too, if there is any.

        Raises:
            TimeOver: it cannot be trained any more.
        """
        file = self._folder / self._run(setting.name, seed) / "measured.json"
        if file.exists():
            found: Row = json.loads(file.read_text())
            if found["of"] == self.about:
                return found
        flops = None
        if setting.equal_to is not None:
            flops = self.flops_of(setting.equal_to, seed)
        trainer = self.trained(setting, seed, flops)
        found = {"of": self.about, **quality(trainer, self.task.metric)}
        if setting.thresholds:
            found["gap"] = soft_gap(trainer)
        if self._elsewhere is not None:
            trainer.dataset = self._elsewhere
            there = quality(trainer, self.task.metric)
            found["elsewhere"] = {key: there[key] for key in ("quality", "executed")}
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(found))
        return found

    def flops_of(self, name: str, seed: int) -> float:
        """Executed by a token of the run of this name."""
        of = next(s for s in settings(self.task) if s.name == name)
        trainer = self.trained(of, seed)
        return executed(trainer.model, trainer.config, self.counted()).mean

    def _begun(self, config: Config, setting: Setting, seed: int) -> Trainer:
        trainer = Trainer(config, device=self.device, dataset=self.dataset)
        if setting.start is not None:
            self._begin_with(trainer, setting.start, seed)
        return trainer

    def _meeting_budget(self, config: Config, trainer: Trainer) -> Config:
        """A random router has no say in how much is executed: where its probabilities begin is
        chosen so that it executes its budget, before anything is tuned."""
        routing = config.model.routing
        assert routing is not None and routing.budget is not None
        trainer.model.eval()
        calibrate_to(trainer.model, self.batch(64), routing.budget)
        # a shift is taken off where a token halts, and leaps, from what `start` is added to
        start = routing.start - next(
            m.shift for m in trainer.model.modules() if isinstance(m, Shifted)
        )
        return replace(config, model=replace(config.model, routing=replace(routing, start=start)))

    def _begin_with(self, trainer: Trainer, start: str, seed: int) -> None:
        before = next(s for s in settings(self.task) if s.name == start)
        weights = self.trained(before, seed).model.state_dict()
        missing, unexpected = trainer.model.load_state_dict(weights, strict=False)
        strange = [n for n in missing if "router" not in n and not n.startswith("budget.")]
        assert not strange and not unexpected, (strange, unexpected)

    def _run(self, name: str, seed: int) -> str:
        return f"{self.name}-{name.replace('/', '-')}-s{seed}"


def equal_flops(config: Config, flops: float, batches: list[Batch]) -> Config:
    """A dense model of as many layers, narrower in dim and hidden alike, that executes as many
    FLOPs per token on these sequences. In bf16, channels of a head come by eights: see `flash`."""
    model = config.model

    def off(tried: Config) -> float:
        return abs(dense_flops(tried, batches) / flops - 1)

    def narrow(dim: int, hidden: int) -> Config:
        return replace(config, model=replace(model, dim=dim, hidden=hidden, routing=None))

    step = 8 * model.heads if config.train.precision == "bf16" else 4 * model.heads
    best = narrow(step, step)
    for dim in range(step, model.dim + 1, step):
        for hidden in range(dim, 4 * dim + 1, 8):
            proportion = hidden / dim / (model.hidden / model.dim)
            tried = narrow(dim, hidden)
            if 0.75 <= proportion <= 1.33 and off(tried) < off(best):
                best = tried
    return best


def quality(trainer: Trainer, metric: str) -> Row:
    """Held-out quality by its metric, and the executed share of the dense model's FLOPs."""
    record = trainer.evaluate()
    found = getattr(record, metric)
    assert found is not None
    return {"quality": found, "executed": record.executed}


def soft_gap(trainer: Trainer) -> float:
    """Nats that the hard threshold of a halting model costs."""
    hard = trainer.evaluate().loss
    trainer.model.soften_routers(True)
    soft = trainer.evaluate().loss
    trainer.model.soften_routers(False)
    return hard - soft


@torch.no_grad()
def calibrate_to(model: CausalLM | Classifier, batch: Batch, share: float) -> None:
    """Shift the routers until so much of the dense model's FLOPs is executed."""
    low, high = -FAR, FAR
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        model.shift_routers(middle)
        ledger = Ledger()
        context = Context(ledger=ledger)
        model(batch.ids_T, batch.position_T, batch.offsets_B1, context=context)
        executed, dense = ledger.totals()
        low, high = (middle, high) if executed < share * dense else (low, middle)


def one_thread() -> None:
    """Small products are slower on several threads of a busy machine, and not repeatable."""
    torch.set_num_threads(1)
