"""Drives a group of ranks through a run: chunks of steps, checkpoints, evaluations, recoveries.

It sees the group only through `Group`, so it is tested with a group that is no process at all.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from moe_router.config import Config
from moe_router.errors import ClusterError
from moe_router.observability.metrics import MetricsWriter
from moe_router.observability.records import EvalRecord, StepRecord
from moe_router_cluster.course import Observer, Progress, Recovery
from moe_router_cluster.faults import Kill
from moe_router_cluster.interrupts import Interrupts
from moe_router_cluster.lost import ActorsLost
from moe_router_cluster.progress import View

CHUNK_S = 0.5  # one call: long enough that calls cost nothing, short enough for Ctrl-C


class Group(Protocol):
    generation: int
    ranks: int

    def form(self, step_dir: Path | str | None) -> int: ...
    def submit(self, method: str, *args: Any) -> list[Any]: ...
    def gather(self, refs: list[Any]) -> list[Any]: ...
    def ask(self, method: str, *args: Any) -> list[Any]: ...
    def replace(self, lost: Iterable[int]) -> None: ...
    def kill(self, rank: int) -> None: ...


class Supervisor:
    """Args:
    config: of the run.
    group: formed, every rank at `step`.
    step: where the run goes on from.
    latest: the newest whole checkpoint, or None.
    agree: called with every step to which all ranks can come back; the epoch that begins there.
    kill: an actor to kill on the way.
    observers: are told what happens.
    """

    def __init__(
        self,
        config: Config,
        group: Group,
        writer: MetricsWriter,
        view: View,
        interrupts: Interrupts,
        *,
        step: int,
        latest: Callable[[], Path | str | None],
        agree: Callable[[int], int] = lambda step: 0,
        kill: Kill | None = None,
        observers: Sequence[Observer] = (),
    ) -> None:
        self.progress = Progress(step=step, saved=step)
        self._config, self._train = config, config.train
        self._group, self._writer, self._view = group, writer, view
        self._interrupts, self._latest, self._agree = interrupts, latest, agree
        self._observers = observers
        rebalance = config.cluster.rebalance
        self._rebalance_every = 0 if rebalance is None else rebalance.every
        self._kill = kill if kill is not None and kill.step >= step else None
        self._killed: tuple[int, int, float] | None = None  # rank, step, time
        self._step_s = 0.0  # how long one step takes

    def run(self) -> bool:
        """To the last step, its checkpoint and its evaluation.

        Returns:
            False if the user ended it first; then a checkpoint of `progress.step` was written.

        Raises:
            ClusterError: more than cluster.max_recoveries actors were lost.
            MoeRouterError: whatever an actor raised.
        """
        self._interrupts.graceful = True
        self._view.at(self.progress.step, self._group.generation)
        try:
            while True:
                try:
                    return self._advance()
                except ActorsLost as lost:
                    self._recover(lost)
        finally:
            self._interrupts.graceful = False

    def _advance(self) -> bool:
        done = self.progress
        self._begin_epoch(done.step)
        while not self._interrupts.asked:
            if self._is_due(self._train.eval_every) and done.step not in done.evals:
                self._evaluate()
            if done.step == self._train.steps:
                return True
            self._chunk()
            # experts move at a step that is kept: the checkpoint says where they are
            if self._is_due(self._train.checkpoint_every) or self._is_due(self._rebalance_every):
                self._save(wait=done.step == self._train.steps)
            elif (every := self._config.cluster.replicate_every) and done.step % every == 0:
                self._group.ask("replicate")  # after a save it would only say the same
        if done.saved < done.step:
            self._save(wait=True)
        return False

    def _is_due(self, every: int) -> bool:
        step = self.progress.step
        return step > 0 and (step == self._train.steps or (every > 0 and step % every == 0))

    def _chunk(self) -> None:
        began = time.monotonic()
        steps = self._chunk_size()
        calls = self._group.submit("run", steps)
        if self._kill is not None and self._kill.step == self.progress.step:
            self._strike(self._kill.rank, min(CHUNK_S, steps * self._step_s) / 2)
        records: list[StepRecord] = self._group.gather(calls)[0]
        seconds = time.monotonic() - began
        for record in records:
            self._writer.write(record)
        done = self.progress
        done.step, done.last = records[-1].step, records[-1]
        done.tokens += sum(record.tokens for record in records)
        done.busy_s += seconds
        self._step_s = seconds / len(records)
        self._view.steps(records)
        for observer in self._observers:
            observer.stepped(records, seconds)

    def _chunk_size(self) -> int:
        """Steps of one call: about CHUNK_S, never across a step where something is due."""
        step = self.progress.step
        stops = [self._train.steps]
        if self._kill is not None and self._kill.step > step:
            stops.append(self._kill.step)
        train, replicate_every = self._train, self._config.cluster.replicate_every
        kept = (train.checkpoint_every, self._rebalance_every)
        for every in (*kept, train.eval_every, replicate_every):
            if every > 0:
                stops.append(step + every - step % every)
        wished = max(1, int(CHUNK_S / self._step_s)) if self._step_s > 0 else 1
        return min(wished, min(stops) - step)

    def _strike(self, rank: int, after_s: float) -> None:
        time.sleep(after_s)  # into the middle of a step
        self._kill = None
        self._killed = rank, self.progress.step, time.monotonic()
        self._group.kill(rank)

    def _evaluate(self) -> None:
        record: EvalRecord = self._group.ask("evaluate")[0]
        self.progress.evals[record.step] = record
        self._writer.write_eval(record)
        self._view.say(f"step {record.step}: held-out {record}")
        for observer in self._observers:
            observer.evaluated(record)

    def _save(self, *, wait: bool) -> None:
        self._group.ask("save", wait)
        self.progress.saved = self.progress.step
        self._begin_epoch(self.progress.saved)

    def _begin_epoch(self, step: int) -> None:
        epoch = self._agree(step)
        for observer in self._observers:
            observer.agreed(epoch, step)

    def _recover(self, lost: ActorsLost) -> None:
        done = self.progress
        # a kill counts from the signal: the loss may be noticed a call later
        victim, at, began = self._killed or (None, done.step, time.monotonic())
        reason, actors = str(lost), set[int]()
        replaced: set[int] = set()
        before, losses = self._group.ranks, len(done.recoveries)
        while True:
            actors |= lost.ranks
            replaced |= lost.ranks | lost.stuck
            losses += 1  # also one that dies of coming back: it would for ever
            self._require_hope(losses, lost)
            try:
                self._group.replace(lost.ranks | lost.stuck)
                step = self._group.form(self._latest())
                break
            except ActorsLost as again:
                lost = again
        recovery = Recovery(
            actors=sorted(actors),
            replaced=sorted(replaced),
            killed=victim in actors,
            step=at,
            from_step=step,
            seconds=round(time.monotonic() - began, 3),
            generation=self._group.generation,
            reason=reason,
            fewer=self._group.ranks if self._group.ranks < before else None,
        )
        done.recoveries.append(recovery)
        done.evals = {at: record for at, record in done.evals.items() if at <= step}
        done.step, done.saved = step, min(done.saved, step)  # a replica is on no disk
        self._killed = None
        self._writer.rewind(step)
        self._view.say(str(recovery), style="bold yellow")
        self._view.at(step, recovery.generation)
        for observer in self._observers:
            observer.recovered(recovery)

    def _require_hope(self, losses: int, lost: ActorsLost) -> None:
        most = self._config.cluster.max_recoveries
        if losses > most:
            raise ClusterError(
                f"{lost} at step {self.progress.step}: loss number {losses}, want at most {most} "
                "(cluster.max_recoveries); see why actors die (memory, the node), then run the "
                "same command: it goes on from the newest checkpoint"
            ) from lost
