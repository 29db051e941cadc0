"""What a person sees while a run goes on: a live bar on a terminal, a line every 5 s elsewhere."""

import math
import time
from collections import deque
from collections.abc import Iterable
from typing import Self

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from moe_router.observability.metrics import imbalance
from moe_router.observability.records import StepRecord

PLAIN_EVERY_S = 5.0
_WINDOW_S = 20.0  # over which speed and time left are averaged


def clock(seconds: float) -> str:
    """1:02, or 1:00:02 past an hour."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def short(number: float) -> str:
    """950, 13.1k, 2.4M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number:.0f}"


class Pace:
    """Speed by the wall clock, so that everything a step waits for counts."""

    def __init__(self) -> None:
        self._marks: deque[tuple[float, int, int]] = deque()  # time, step, tokens since the start
        self._tokens = 0

    def mark(self, step: int, tokens: int) -> None:
        """Steps up to `step` are done, `tokens` more than at the last mark."""
        now = time.monotonic()
        self._tokens += tokens
        self._marks.append((now, step, self._tokens))
        while len(self._marks) > 2 and now - self._marks[0][0] > _WINDOW_S:
            self._marks.popleft()

    def restart(self, step: int) -> None:
        """The run stands at `step` again; what went before says nothing about speed."""
        self._marks.clear()
        self.mark(step, 0)

    def _gone(self) -> tuple[float, int, int]:
        first, last = self._marks[0], self._marks[-1]
        return last[0] - first[0], last[1] - first[1], last[2] - first[2]

    @property
    def tokens_per_second(self) -> float:
        seconds, _, tokens = self._gone()
        return tokens / seconds if seconds > 0 else 0.0

    def seconds_left(self, step: int, steps: int) -> float | None:
        seconds, done, _ = self._gone()
        return (steps - step) * seconds / done if done > 0 else None


class TwoLines(Progress):
    """A bar, and below it what fits into the width of an 80-column terminal."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        for task in self.tasks:
            yield Text(task.description, style="dim", no_wrap=True, overflow="ellipsis")


class View:
    """Args:
    console: where to; a terminal gets the bar.
    steps: of the whole run.
    bytes_per_token: of the data, for bits per byte; None says none.
    actors: how many hold the model.
    """

    def __init__(
        self, console: Console, *, steps: int, bytes_per_token: float | None, actors: int
    ) -> None:
        self.console = console
        self.pace = Pace()
        self._steps = steps
        self._bytes_per_token = bytes_per_token
        self._actors = actors
        self._generation = 1
        self._dropped = self._rows = 0
        self._spoke_at = -math.inf
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            columns = (
                TextColumn("[bold]{task.completed:.0f}[/]/{task.total:.0f}"),
                BarColumn(bar_width=None, complete_style="cyan", finished_style="green"),
                TextColumn("{task.fields[left]}"),
            )
            self._bar = TwoLines(*columns, console=self.console, expand=True)
            self._task = self._bar.add_task("", total=self._steps, left="")
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def at(self, step: int, generation: int) -> None:
        """The group of `generation` stands at `step`: a start, or after a recovery."""
        self._generation = generation
        self.pace.restart(step)
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def steps(self, records: list[StepRecord]) -> None:
        """Some more committed steps."""
        if not records:
            return
        last = records[-1]
        self._dropped += sum(record.dropped for record in records)
        self._rows += sum(record.rows for record in records)
        self.pace.mark(last.step, sum(record.tokens for record in records))
        if self._bar is not None:
            self._bar.update(
                self._task, completed=last.step, description=self.line(last), left=self.left(last)
            )
        elif time.monotonic() - self._spoke_at >= PLAIN_EVERY_S or last.step == self._steps:
            self._spoke_at = time.monotonic()
            done = f"step {last.step}/{self._steps} ({last.step / self._steps:.0%})"
            self.say(f"{done}  {self.line(last)}  {self.left(last)}".rstrip())

    def line(self, record: StepRecord) -> str:
        """What is worth knowing about the newest step, short enough for one row."""
        per_token, dense = self._bytes_per_token, record.dense_flops
        bits = None if per_token is None else record.loss / math.log(2) / per_token
        computed = record.executed_flops / dense if dense else 1.0
        balance = imbalance(record.load_LE)
        share = f" ({self._dropped / self._rows:.1%})" if self._dropped and self._rows else ""
        parts = [
            f"loss {record.loss:.3f}",
            "" if bits is None else f"{bits:.2f} bits/byte",
            "" if computed == 1.0 else f"computed {computed:.0%}",
            f"{short(self.pace.tokens_per_second)} tok/s",
            "" if balance is None else f"balance {balance:.2f}",
            f"dropped {short(self._dropped)}{share}" if self._rows else "",
            f"gen {self._generation} x{self._actors}",
        ]
        return "  ".join(part for part in parts if part)

    def left(self, record: StepRecord) -> str:
        """Time to the last step; nothing before it can be known."""
        seconds = self.pace.seconds_left(record.step, self._steps)
        return "" if seconds is None else f"{clock(seconds)} left"

    def say(self, text: str, style: str | None = None) -> None:
        """One line that stays, above the bar where there is one."""
        self.console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)
