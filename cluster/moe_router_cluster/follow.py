"""Following a job: its log as it comes, with a bar on a terminal, until it ends.

Nothing here touches the job: who stops looking can look again, from the beginning of the log.
"""

import asyncio
import re
import time
from collections.abc import AsyncIterator
from typing import Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table

from moe_router.cli import INTERRUPTED
from moe_router.errors import ClusterError
from moe_router_cluster.jobs import Job
from moe_router_cluster.progress import TwoLines, clock

_STEP = re.compile(r"step (\d+)/(\d+) \(\d+%\)  (.*)")  # as progress.View prints it
_AGAIN_S = 1.0  # after a lost connection
_TRIES = 30  # times that nothing new came before we give up on a cluster
_EXIT = {"SUCCEEDED": 0, "FAILED": 1, "STOPPED": INTERRUPTED}


class AnyJobs(Protocol):
    """Those of a cluster, or of this machine.

    Attributes:
        option: what `moe-router jobs` wants to find them.
    """

    @property
    def option(self) -> str: ...
    def all(self) -> list[Job]: ...
    def get(self, id: str) -> Job: ...
    def stop(self, id: str) -> bool: ...
    def tail(self, id: str) -> AsyncIterator[str]: ...


class LogView:
    """Prints a log that comes in pieces; on a terminal its steps move a bar."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.seen = 0  # characters shown, or waiting for the end of their line
        self._skip = 0  # characters to come that were shown before a connection broke
        self._rest = ""
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._rest:
            self._line(self._rest)
            self._rest = ""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def again(self) -> None:
        """The log will come from its beginning."""
        self._skip = self.seen

    def feed(self, text: str) -> None:
        skipped = min(self._skip, len(text))
        self._skip -= skipped
        self.seen += len(text) - skipped
        *lines, self._rest = (self._rest + text[skipped:]).split("\n")
        for line in lines:
            self._line(line)

    def _line(self, line: str) -> None:
        step = _STEP.fullmatch(line.rstrip()) if self.console.is_terminal else None
        if step is None:
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)
            return
        if self._bar is None:
            columns = (
                TextColumn("[bold]{task.completed:.0f}[/]/{task.total:.0f}"),
                BarColumn(bar_width=None, complete_style="cyan", finished_style="green"),
            )
            self._bar = TwoLines(*columns, console=self.console, expand=True)
            self._task = self._bar.add_task("", total=int(step[2]))
            self._bar.start()
        self._bar.update(self._task, completed=int(step[1]), description=step[3])


def follow(jobs: AnyJobs, id: str, console: Console) -> int:
    """Show a job's log until the job ends; Ctrl-C lets it go on alone.

    Returns:
        The exit code of a command that stands for the job: 0 if it succeeded, 130 if it was
        stopped, or if the user looks no longer.

    Raises:
        ClusterError: the job failed, there is no such job, or the cluster is gone.
    """
    job = jobs.get(id)
    again = f"moe-router jobs {id}{jobs.option}"
    try:
        with LogView(console) as view:
            job = _until_over(jobs, job, view, again)
    except KeyboardInterrupt:
        _say(console, f"detached; {id} goes on. Look again: {again}")
        _say(console, f"stop it: moe-router jobs --stop {id}{jobs.option}")
        return INTERRUPTED
    if job.state == "FAILED":
        raise ClusterError(f"{id} failed: {job.message}; its log is above, and by {again}")
    _say(console, f"{id} {'was stopped' if job.state == 'STOPPED' else 'succeeded'}{_took(job)}")
    return _EXIT[job.state]


def job_table(found: list[Job]) -> Table:
    """Jobs in the order given."""
    table = Table("job", "run", "state", "began", "took")
    for job in found:
        began = job.began and time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(job.began))
        table.add_row(job.id, job.run, job.state.lower(), began or "", _took(job).strip(" after"))
    return table


def _until_over(jobs: AnyJobs, job: Job, view: LogView, again: str) -> Job:
    """Tail the log, anew wherever the connection breaks, until the job is over."""
    import aiohttp  # comes with Ray's job client

    in_vain = 0
    while True:
        seen, whole = view.seen, True
        try:
            asyncio.run(_tail(jobs, job.id, view))
        except (aiohttp.ClientError, OSError, RuntimeError):
            whole = False
        view.again()
        in_vain = 0 if view.seen > seen else in_vain + 1
        try:
            job = jobs.get(job.id)
        except ClusterError as error:
            if in_vain > _TRIES:
                raise ClusterError(f"{error}; {job.id} may go on, look again by {again}") from error
        else:
            if job.over and (whole or in_vain > _TRIES):
                return job  # a tail that ended by itself has shown the whole log
        time.sleep(_AGAIN_S)


async def _tail(jobs: AnyJobs, id: str, view: LogView) -> None:
    async for text in jobs.tail(id):
        view.feed(text)


def _took(job: Job) -> str:
    if job.began is None:
        return ""
    return f" after {clock((job.ended or time.time()) - job.began)}"


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)
