"""The course of a run: what it has come to, and who is told of what happens to it."""

from dataclasses import dataclass, field
from typing import Protocol

from moe_router.observability.records import EvalRecord, StepRecord


@dataclass(frozen=True, slots=True)
class Recovery:
    """Attributes:
    actors: that were lost; empty when only a connection broke.
    replaced: these, and those that hung behind them.
    killed: on purpose, by --kill.
    step: steps committed when it happened.
    from_step: where all ranks went on from.
    seconds: from the loss until every rank stood at from_step in the new generation.
    fewer: ranks that go on, where there was no place for as many as before.
    """

    actors: list[int]
    replaced: list[int]
    killed: bool
    step: int
    from_step: int
    seconds: float
    generation: int
    reason: str
    fewer: int | None = None

    def __str__(self) -> str:
        who = f"actor{'s' * (len(self.actors) > 1)} {', '.join(map(str, self.actors))}"
        what = "killed" if self.killed else "lost"
        spot = f"{what} at step {self.step}, recovered in {self.seconds:.1f} s"
        rest = "" if self.fewer is None else f"; no place for more, {self.fewer} go on"
        return f"{who if self.actors else 'connection'} {spot}{rest}"


@dataclass
class Progress:
    """What the run has come to, for the summary.

    Attributes:
        step: optimizer steps committed.
        saved: the step of the newest checkpoint asked for.
        tokens, busy_s: trained on by this process, and the time that took, recoveries excluded.
    """

    step: int = 0
    saved: int = 0
    tokens: int = 0
    busy_s: float = 0.0
    last: StepRecord | None = None
    evals: dict[int, EvalRecord] = field(default_factory=dict)
    recoveries: list[Recovery] = field(default_factory=list)


class Observer(Protocol):
    """Is told what the supervisor sees, after it has happened; must not fail the run."""

    def agreed(self, epoch: int, step: int) -> None:
        """A new epoch, which begins with a step that every rank can come back to."""

    def stepped(self, records: list[StepRecord], seconds: float) -> None:
        """Some more committed steps, which took so long by the wall clock."""

    def evaluated(self, record: EvalRecord) -> None: ...

    def recovered(self, recovery: Recovery) -> None: ...
