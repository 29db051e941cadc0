"""One rank of a run: its slice of every layer's experts, and a copy of the dense rest.

How a step is computed is in `moe_router.training`; this class gives it a process group and a name
that other processes can call. It is a plain class, so it is tested without Ray.
"""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import ray

from moe_router.config import Config
from moe_router.errors import CheckpointError, ClusterError, WorkerLostError
from moe_router.observability.event_log import EventLog, Fact
from moe_router.observability.records import EvalRecord, StepRecord
from moe_router.serving.decoder import Decoder
from moe_router.serving.requests import Event, Work
from moe_router.training.calibrate import Shifts
from moe_router.training.checkpoint import CheckpointWriter
from moe_router.training.checkpoint_files import read_about
from moe_router.training.checkpoint_store import Store, open_store
from moe_router.training.data import AnyDataset, load_dataset
from moe_router.training.inference import load_for_inference
from moe_router.training.loop import Trainer
from moe_router.training.share import agreed, facts
from moe_router_cluster.gating_actor import Reporter
from moe_router_cluster.journal import LOGS
from moe_router_cluster.member import Member
from moe_router_cluster.replicas import SCHEME, ReplicaStore

Part = TypeVar("Part")
_ray: Any = ray  # half of its functions have no types


class ExpertShard(Member):
    """Args:
    config: of the run.
    run_dir: absolute path of the run's folder.
    device: "cpu" or "cuda"; Ray shows a cuda actor its own GPU only.
    folder: where the command was typed; relative paths of `data` start there.
    """

    def __init__(self, config: Config, run_dir: str, device: str, folder: str) -> None:
        # nothing here may fail: Ray reports an error in a constructor as a lost actor
        self._config = config
        self._run_dir = Path(run_dir)
        super().__init__(device)
        self._folder = folder
        self._epoch = 0
        self._dataset: AnyDataset | None = None
        self._trainer: Trainer | None = None
        self._reporter: Reporter | None = None
        self._replicas: ReplicaStore | None = None
        self._copier: CheckpointWriter | None = None  # of replicas
        self._decoder: Decoder | None = None
        self._shifts: Shifts | None = None
        self._facts: dict[str, Any] = {}

    def leave(self) -> None:
        """Finish what is being written; forget the trainer and the process group.

        Raises:
            CheckpointError: the disk refused the checkpoint that was being written.
        """
        trainer, self._trainer, self._reporter = self._trainer, None, None
        copier, self._copier = self._copier, None
        if copier is not None:
            with suppress(WorkerLostError, CheckpointError):  # the one before is there
                copier.wait()
        if trainer is not None:
            with suppress(WorkerLostError):  # a checkpoint that ranks are missing from
                trainer.close()
        super().leave()

    def restore(self, step_dir: str | None) -> int:
        """Make the trainer from a checkpoint, or from the seed where there is none.

        Returns:
            Optimizer steps done.
        """
        if self._dataset is None:
            self._go_to_folder()
            self._dataset = load_dataset(self._config.data)
        with self._peers_may_be_lost():
            self._trainer = Trainer(
                self._config,
                rank=self._rank,
                ranks=self._ranks,
                device=self._device,
                dataset=self._dataset,
                run_dir=self._run_dir,
            )
            if self._replicas is not None:
                where = (self._rank, self._ranks, self._config)
                self._copier = CheckpointWriter(*where, self._replicas)
            if step_dir is not None:
                with self._store_of(step_dir).local(step_dir) as folder:
                    self._trainer.restore(folder)
            self._note("restored", checkpoint=step_dir)
            return self._trainer.step

    def run(self, steps: int) -> list[StepRecord]:
        """Train `steps` optimizer steps. Records come from rank 0 alone: they are the same."""
        with self._peers_may_be_lost():
            records = [self._step() for _ in range(steps)]
        if self._reporter is not None:
            self._reporter.report(self._ready().own_load_LE)
        return records if self._rank == 0 else []

    def _step(self) -> StepRecord:
        trainer = self._ready()
        record = trainer.train_step()
        if (what := trainer.rebalanced) is not None and self._rank == 0:
            event = "experts moved" if what.moved else "experts stay"
            self._note("experts went back" if what.rolled_back else event, **what.facts())
        return record

    def share(self, service: Any, epoch: int, step: int) -> None:
        """From now on, report to the gating service under `epoch`; rank 0 publishes it.

        Args:
            service: handle of the actor; one that is gone changes nothing.
            step: the checkpointed step that the epoch begins with.
        """
        with self._peers_may_be_lost():
            state = agreed(self._ready(), epoch=epoch, step=step)
        self._epoch = epoch
        state_of_first = state if self._rank == 0 else None
        self._reporter = Reporter(service, self._rank, epoch, state_of_first)

    def keep_replicas(self, holders: list[Any]) -> None:
        """From the next `restore` on, `replicate` sends to these, one a rank."""
        self._replicas = ReplicaStore(holders, self._run_dir, self._rank)
        self._replicas.clear()  # the process before this one may have been killed while sending

    def replicate(self) -> None:
        """Send this step to memory elsewhere while training goes on. A lost holder costs nothing
        but the replica: the next one is tried again."""
        copier = self._copier
        if copier is None:
            raise ClusterError(f"rank {self._rank}: nobody holds replicas; call keep_replicas")
        trainer = self._ready()
        with self._peers_may_be_lost():
            try:
                held = (trainer.step, trainer.state())
                copier.save(self._run_dir, *held, wait=False, more=trainer.about())
            except CheckpointError as error:
                self._note("no replica", reason=str(error))

    def evaluate(self) -> EvalRecord:
        with self._peers_may_be_lost():
            return self._ready().evaluate()

    def save(self, wait: bool) -> None:
        """Write a checkpoint of the current step; wait=False returns while it is written."""
        with self._peers_may_be_lost():
            self._ready().save(self._run_dir, wait=wait)
            self._note("checkpoint", written=wait)

    def load(self, step_dir: str) -> int:
        """Make ready to serve: the weights of a checkpoint, of the experts this rank's part.

        Returns:
            Optimizer steps that the checkpoint has behind it.

        Raises:
            NotCausalError: a layer's routing looks at later tokens.
        """
        self._go_to_folder()
        folder = Path(step_dir)
        step = int(read_about(folder)["step"])
        model, config, tokenizer = load_for_inference(folder, self._device, ranks=self._ranks)
        remember = self._config.serve.remember  # the checkpoint's may say otherwise
        self._decoder = Decoder(model, tokenizer.document_id, remember=remember)
        self._shifts = Shifts(model, config)
        self._facts = facts(model, config.run.name, epoch=1, step=step)
        return step

    def decode(self, work: Work) -> list[Event]:
        """One pass; see `Decoder.step`."""
        decoder = self._serving(self._decoder)
        with self._peers_may_be_lost():
            return decoder.step(work)

    def prepare_shifts(self, budget: float) -> None:
        """See `Shifts.prepare`."""
        self._serving(self._shifts).prepare(budget)

    def find_shift(self, budget: float) -> float:
        """See `Shifts.find`."""
        shifts = self._serving(self._shifts)
        with self._peers_may_be_lost():
            return shifts.find(budget)

    def routers(self) -> dict[str, Any]:
        """What a gating service publishes of the served model; see `facts`."""
        return self._facts

    def _serving(self, part: Part | None) -> Part:
        if part is None:
            raise ClusterError(f"rank {self._rank}: nothing to serve yet; call load first")
        return part

    def _store_of(self, step: str) -> Store:
        if self._replicas is not None and step.startswith(SCHEME):
            return self._replicas
        return open_store(self._config, self._run_dir, self._rank)

    def _go_to_folder(self) -> None:
        if os.path.isdir(self._folder):
            os.chdir(self._folder)

    def _ready(self) -> Trainer:
        if self._trainer is None:
            raise ClusterError(f"rank {self._rank}: no trainer yet; call restore first")
        return self._trainer

    def on_loss(self, reason: str) -> None:
        self._note("peer lost", reason=reason)

    def _note(self, event: str, **more: Fact) -> None:
        """In the log of a rank that trains."""
        if self._trainer is not None:
            path = self._run_dir / LOGS / f"rank_{self._rank}.jsonl"
            EventLog(path, self._where).write(event, **more)

    def _where(self) -> dict[str, Fact]:
        where = {"rank": self._rank, "step": self._ready().step, "epoch": self._epoch}
        return {**where, "generation": self._generation, "pid": os.getpid()}


# max_concurrency=2: a ping answers while a step runs. max_restarts=0: an actor that Ray brings back
# has lost its process group, so only the supervisor may replace one. max_task_retries=0: a step
# that ran half must never run again by itself.
ExpertShardActor = _ray.remote(max_concurrency=2, max_restarts=0, max_task_retries=0)(ExpertShard)
