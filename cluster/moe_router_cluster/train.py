"""`moe-router train`, from a config to a finished run folder.

Ray is imported only after its environment is set, and data is read before Ray starts: what is
wrong with a config or a file is said within a second or two.
"""

import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console

from moe_router.config import Config
from moe_router.errors import ClusterError
from moe_router.observability.metrics import MetricsWriter
from moe_router.observability.summary import quality_of, read_summary
from moe_router.training.checkpoint_store import open_store
from moe_router.training.data import AnyDataset, Dataset, load_dataset
from moe_router_cluster.course import Observer, Progress
from moe_router_cluster.faults import Kill
from moe_router_cluster.finish import finish, near
from moe_router_cluster.interrupts import Interrupts
from moe_router_cluster.journal import Journal
from moe_router_cluster.lost import ActorsLost
from moe_router_cluster.progress import View
from moe_router_cluster.run_folder import RunFolder, open_run
from moe_router_cluster.session import prepare_environment, ray_session
from moe_router_cluster.supervisor import Supervisor

if TYPE_CHECKING:
    from moe_router_cluster.gating_actor import Agreement  # imports Ray
    from moe_router_cluster.shard_group import ShardGroup

_MEASURED = 16  # held-out rows that bytes per token is taken over


def train(
    config: Config, console: Console, *, kill: str | None = None, restart: bool = False
) -> bool:
    """Train, or go on training, the run that `config` names.

    Args:
        kill: RANK@STEP or RANK@FRACTION: an actor to SIGKILL on the way.
        restart: move an older run of this name aside.

    Returns:
        False if the user ended it; a checkpoint was written, and the same call goes on from it.

    Raises:
        MoeRouterError: one line for the user.
        KeyboardInterrupt: the user would not wait for the checkpoint.
    """
    began = time.monotonic()
    order = None if kill is None else Kill.parse(kill, config)
    prepare_environment(config.cluster)
    with Interrupts() as interrupts, open_run(config, restart=restart) as folder:
        if folder.finished:
            _say_finished(folder.path, console)
            return True
        console.print(f"{config.run.name}: {config.train.steps} steps; starting", highlight=False)
        dataset = load_dataset(config.data)
        text = _Text(dataset.vocab, bytes_per_token(dataset))
        with ray_session(config.cluster):
            interrupts.take_over()  # Ray has put its own handler on SIGTERM
            run = _Run(config, folder, console, interrupts, order, began)
            return run.with_actors(text)


def bytes_per_token(dataset: AnyDataset) -> float | None:
    """Of the held-out text; 1 for bytes, but for the separators; None of labelled data,
    whose loss is not per token."""
    if not isinstance(dataset, Dataset):
        return None
    rows = [dataset.val.row(i)[1:] for i in range(min(_MEASURED, dataset.val.rows))]
    sizes = dataset.tokenizer.bytes_of[np.concatenate(rows)]
    return max(float(sizes.mean()), 1e-3)  # never 0: a text of separators alone


@dataclass(frozen=True, slots=True)
class _Text:
    """What is told of the data when it has been read.

    Attributes:
        vocab: ids of the tokenizer.
        bytes_per_token: see the function of this name.
    """

    vocab: int
    bytes_per_token: float | None


@dataclass(frozen=True, slots=True)
class _Run:
    """One process's part of a run, while Ray is there."""

    config: Config
    folder: RunFolder
    console: Console
    interrupts: Interrupts
    kill: Kill | None
    began: float  # time.monotonic()

    def with_actors(self, text: _Text) -> bool:
        from ray.exceptions import RayError, RayTaskError

        from moe_router_cluster.gating_actor import Agreement
        from moe_router_cluster.shard_group import ShardGroup

        group = ShardGroup(self.config, self.folder.path)
        agreement = Agreement(self.config, group.ask)
        try:
            return self._drive(group, agreement, text)
        except RayTaskError:
            raise  # a bug of ours: its traceback is what is needed
        except RayError as error:
            first = next(iter(str(error).splitlines()), "")
            raise ClusterError(f"Ray failed: {type(error).__name__}: {first}") from error
        finally:
            agreement.close()
            group.close()

    def _drive(self, group: "ShardGroup", agreement: "Agreement", text: _Text) -> bool:
        path, actors = self.folder.path, self.config.cluster.actors
        store = open_store(self.config, path)
        step = group.start(store.latest(), self._say)
        self._say(
            f"{actors} actor{'s' * (actors > 1)} on {group.device}, ready after "
            f"{time.monotonic() - self.began:.1f} s"
        )
        ended, progress = self._supervise(group, agreement, step, text)
        with suppress(ActorsLost):  # what an actor that dies now held is on disk
            group.ask("leave")
        group.close()
        last = store.latest()
        if not ended or last is None:
            saved = "nothing was saved yet" if last is None else f"{near(last)} is written"
            self._say(f"stopped: {saved}; the same command goes on")
            return False
        device, began = group.device, self.began
        step_dir = store.bring(last, path)
        finish(self.config, path, step_dir, progress, self.console, began=began, device=device)
        return True

    def _supervise(
        self, group: "ShardGroup", agreement: "Agreement", step: int, text: _Text
    ) -> tuple[bool, Progress]:
        from moe_router_cluster.replicas import newest

        config, path = self.config, self.folder.path
        steps, actors = config.train.steps, config.cluster.actors
        journal = Journal(path, step)
        journal.say("started", actors=actors, device=group.device, generation=group.generation)
        store = open_store(config, path)
        view = View(self.console, steps=steps, bytes_per_token=text.bytes_per_token, actors=actors)
        with MetricsWriter(path, config.run, resume_from=step) as writer, view:
            if step:
                view.say(f"going on from step {step} of {near(path)}")
            supervisor = Supervisor(
                config,
                group,
                writer,
                view,
                self.interrupts,
                step=step,
                latest=lambda: newest(store.latest(), group.latest_replica()),
                agree=agreement.agree,
                kill=self.kill,
                observers=(journal, self._meters(group, text)),
            )
            ended = supervisor.run()
        journal.say("finished" if ended else "stopped")
        return ended, supervisor.progress

    def _meters(self, group: "ShardGroup", text: _Text) -> Observer:
        from moe_router_cluster.meters import Meters

        return Meters(self.config, text.vocab, group.ask_first("device_name"))

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


def _say_finished(path: Path, console: Console) -> None:
    summary = read_summary(path)
    console.print(
        f"{near(path)} is finished: {summary.get('steps')} steps, {quality_of(summary)}; see "
        f"{near(path / 'report.html')}, or "
        "train it anew with --restart",
        highlight=False,
        soft_wrap=True,
    )
