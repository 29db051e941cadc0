"""The supervisor over a group that is a few lines of arithmetic: no process, no Ray."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from moe_router.config_rebalance import RebalanceConfig
from moe_router.errors import CheckpointError, ClusterError
from moe_router.observability.csv_log import read_rows
from moe_router.observability.metrics import MetricsWriter
from moe_router.observability.records import EvalRecord, StepRecord
from moe_router_cluster import supervisor as module
from moe_router_cluster.course import Recovery
from moe_router_cluster.faults import Kill
from moe_router_cluster.interrupts import Interrupts
from moe_router_cluster.lost import ActorsLost
from moe_router_cluster.progress import View
from moe_router_cluster.supervisor import Supervisor


class FakeGroup:
    """Counts. `script` maps how many calls were made to what goes wrong then."""

    ranks = 2

    def __init__(self, script=None, on_call=lambda name, step: None):
        self.generation, self.step, self.calls, self.saved = 1, 0, [], []
        self.script, self.on_call, self.replaced = dict(script or {}), on_call, []
        self.dead: set[int] = set()

    def submit(self, method, *args):
        return [(method, args)]

    def gather(self, refs):
        ((method, args),) = refs
        self.calls.append((method, *args))
        if self.dead:
            dead, self.dead = self.dead, set()
            raise ActorsLost(dead, "actor died")
        if (wrong := self.script.pop(len(self.calls), None)) is not None:
            raise wrong
        self.on_call(method, self.step)
        return [getattr(self, f"_{method}")(*args), None]

    def ask(self, method, *args):
        return self.gather(self.submit(method, *args))

    def form(self, step_dir):
        self.generation += 1
        self.step = 0 if step_dir is None else int(step_dir.name.removeprefix("step_"))
        return self.step

    def replace(self, lost):
        self.replaced.append(set(lost))

    def kill(self, rank):
        self.dead.add(rank)

    def _run(self, steps):
        first, self.step = self.step + 1, self.step + steps
        return [
            StepRecord(s, 1.0 / s, {}, 1.0, 1e-3, 10, 0.01) for s in range(first, self.step + 1)
        ]

    def _evaluate(self):
        return EvalRecord(self.step, 1.0, 2.0, 4.0, 10)

    def _save(self, wait):
        self.saved.append((self.step, wait))

    def latest(self):
        return Path(f"step_{self.saved[-1][0]}") if self.saved else None


@pytest.fixture
def drive(tiny, tmp_path):
    def go(group, *, kill=None, step=0, interrupts=None, **config):
        config = tiny(**config)
        out = io.StringIO()
        group.step = step
        view = View(
            Console(file=out, width=200), steps=config.train.steps, bytes_per_token=1.0, actors=2
        )
        with MetricsWriter(tmp_path, config.run, resume_from=step) as writer, view:
            run = Supervisor(
                config,
                group,
                writer,
                view,
                interrupts or Interrupts(),
                step=step,
                latest=group.latest,
                kill=kill,
            )
            ended = run.run()
        steps = [int(row["step"]) for row in read_rows(tmp_path / "metrics.csv")]
        return ended, run.progress, steps, out.getvalue()

    return go


def test_experts_move_at_steps_that_are_kept(drive):
    """A look at the load ends a call, and a checkpoint follows it: where it moved them is there."""
    group = FakeGroup()
    rebalance = RebalanceConfig(every=4)
    ended, *_ = drive(group, steps=12, cluster={"rebalance": rebalance})
    assert ended
    assert group.saved == [(4, False), (5, False), (8, False), (10, False), (12, True)]


def test_a_run_without_losses_saves_and_evaluates_where_it_should(drive):
    group = FakeGroup()
    ended, progress, steps, _ = drive(group, steps=12, eval_every=4)
    assert ended and progress.step == 12 and progress.tokens == 120
    assert group.saved == [(5, False), (10, False), (12, True)]
    assert [call for call in group.calls if call[0] == "evaluate"] == [("evaluate",)] * 3
    assert sorted(progress.evals) == [4, 8, 12]
    assert steps == list(range(1, 13))


def test_a_chunk_grows_to_half_a_second_and_stops_where_something_is_due(drive, monkeypatch):
    now = 0.0
    group = FakeGroup()

    def tick(name, step):
        nonlocal now
        now += 0.05 * group.calls[-1][1] if name == "run" else 0.0

    group.on_call = tick
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    drive(group, steps=40, checkpoint_every=30, eval_every=0)
    assert [call[1] for call in group.calls if call[0] == "run"] == [1, 10, 10, 9, 10]


@pytest.mark.parametrize("call", range(1, 9))
def test_a_loss_at_any_call_is_replayed_and_no_step_appears_twice(drive, call):
    group = FakeGroup({call: ActorsLost([1], "actor 1 died", stuck=[0])})
    ended, progress, steps, said = drive(group, steps=12)
    assert ended and progress.step == 12
    assert group.replaced == [{0, 1}]
    assert steps == list(range(1, 13))
    assert "actor 1 lost at step " in said
    (recovery,) = progress.recoveries
    assert recovery.actors == [1] and recovery.replaced == [0, 1]
    assert recovery.generation == group.generation == 2
    assert sorted(progress.evals) == [12]


def test_a_kill_comes_while_its_step_runs(drive):
    group = FakeGroup()
    ended, progress, steps, said = drive(group, kill=Kill(1, 7), steps=12)
    assert ended and steps == list(range(1, 13))
    (recovery,) = progress.recoveries
    assert recovery.killed and (recovery.step, recovery.from_step) == (7, 5)
    assert "actor 1 killed at step 7, recovered in " in said


def test_a_kill_that_lies_behind_a_resumed_run_does_not_come(drive):
    _, progress, _, _ = drive(FakeGroup(), kill=Kill(1, 7), step=10, steps=12)
    assert progress.recoveries == []


def test_a_loss_during_a_recovery_is_one_more_recovery_of_the_same_step(drive, monkeypatch):
    group = FakeGroup({3: ActorsLost([1], "actor 1 died")})
    form, failures = group.form, [ActorsLost([0], "actor 0 died")]

    def fragile(step_dir):
        if failures:
            raise failures.pop()
        return form(step_dir)

    monkeypatch.setattr(group, "form", fragile)
    _, progress, _, said = drive(group, steps=12)
    assert group.replaced == [{1}, {0}]
    assert "actors 0, 1 lost at step" in said
    (recovery,) = progress.recoveries
    assert recovery.reason == "actor 1 died"


def test_too_many_losses_end_the_run_in_one_line(drive):
    losses = {call: ActorsLost([0], "actor 0 died") for call in range(1, 20)}
    with pytest.raises(ClusterError) as gave_up:
        drive(FakeGroup(losses), steps=12, cluster={"max_recoveries": 3})
    said = str(gave_up.value)
    assert "actor 0 died at step 0: loss number 4, want at most 3 (cluster.max_recoveries)" in said
    assert "\n" not in said


def test_actors_that_die_in_every_recovery_end_the_run(drive, monkeypatch):
    group = FakeGroup({3: ActorsLost([1], "actor 1 died")})

    def fragile(step_dir):
        assert len(group.replaced) < 9, "it would go on for ever"
        raise ActorsLost([1], "actor 1 died")

    monkeypatch.setattr(group, "form", fragile)
    with pytest.raises(ClusterError, match="loss number 4, want at most 3"):
        drive(group, steps=12, cluster={"max_recoveries": 3})
    assert len(group.replaced) == 3


def test_an_error_of_an_actor_ends_the_run_as_it_is(drive):
    group = FakeGroup({4: CheckpointError("step_5: disk full")})
    with pytest.raises(CheckpointError, match="step_5: disk full"):
        drive(group, steps=12)
    assert group.replaced == []


def test_ctrl_c_ends_with_a_checkpoint_of_the_step_it_came_in(drive):
    interrupts = Interrupts()

    def ask(name, step):
        interrupts.asked = interrupts.asked or step >= 7

    group = FakeGroup(on_call=ask)
    ended, progress, steps, _ = drive(group, interrupts=interrupts, steps=1000)
    assert not ended
    assert group.saved[-1][0] == progress.step  # closing the trainer waits for the file
    assert steps == list(range(1, progress.step + 1))
    assert not interrupts.graceful


def test_ctrl_c_during_a_loss_does_not_wait_for_more_steps(drive):
    interrupts = Interrupts()
    interrupts.asked = True
    group = FakeGroup({1: ActorsLost([1], "actor 1 died")})
    ended, progress, steps, _ = drive(group, interrupts=interrupts, steps=12)
    assert not ended and progress.step == 0 and steps == []


def test_a_finished_training_that_was_not_evaluated_is_evaluated_only(drive):
    group = FakeGroup()
    ended, progress, _, _ = drive(group, step=12, steps=12)
    assert ended and group.calls == [("evaluate",)] and sorted(progress.evals) == [12]


@pytest.mark.parametrize(
    ("actors", "killed", "text"),
    [
        ([1], True, "actor 1 killed at step 3, recovered in 1.8 s"),
        ([0, 2], False, "actors 0, 2 lost at step 3, recovered in 1.8 s"),
        ([], False, "connection lost at step 3, recovered in 1.8 s"),
    ],
)
def test_a_recovery_says_who_and_how_long(actors, killed, text):
    assert str(Recovery(actors, actors, killed, 3, 0, 1.84, 2, "died")) == text
