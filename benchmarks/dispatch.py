"""Tokens between ranks: dispatch and combine by every transport, beside plain torch and the link.

    python -m benchmarks.dispatch [--only PATTERN] [--ranks 2] [--seconds 300] [--save]

Ranks are processes that this one starts: one for each GPU over NCCL, else on the CPU over gloo. An
exact round trip is checked before anything is timed. A row's value is that of the fastest of our
transports; p50 and p99 are of the slowest rank, over 5 rounds in which all contenders take turns.
From x and Choice to received rows and the local Plan; and back. A row is written as soon as it is
measured. A contender that fails has its reason in the row; one that takes the ranks with it is
left out when they start again. `--timeline FILE` writes a profile of a layer with a shared expert,
which runs while rows travel: a chrome trace of all ranks and transports.
"""

import argparse
import fnmatch
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.multiprocessing.spawn import ProcessException

from benchmarks.dispatch_contenders import ROUTINGS
from benchmarks.dispatch_measure import SAMPLES, Job, measure_jobs
from benchmarks.dispatch_ranks import PROGRESS
from benchmarks.dispatch_rows import (
    LAYER,
    LAYER_ROW,
    SHAPES,
    case_name,
    case_rows,
    failed_row,
    layer_row,
    shown,
)
from benchmarks.dispatch_timeline import draw_timeline
from benchmarks.results import Row, provenance, save
from moe_router.dispatch.ranks import local_device, run_here

WAYS = ("dispatch", "combine")


class Table:
    """What is asked for, and the rows so far.

    Args:
        folder: where the ranks write what they measured.
        patterns: of the rows to keep.
        saves: whether rows are kept in benchmarks/results.
    """

    def __init__(
        self, jobs: list[Job], folder: Path, ranks: int, patterns: list[str], saves: bool
    ) -> None:
        self.left, self.folder, self.ranks = jobs, folder, ranks
        self.excluded: dict[str, str] = {}  # contenders that took the ranks with them, and why
        self._patterns, self._saves = patterns, saves
        self._origin = provenance(local_device(ranks))

    def collect(self) -> None:
        """Rows of what was measured since the last time."""
        for job in list(self.left):
            found = self.folder / f"{job.name}.json"
            if found.is_file():
                self._keep(job, self._rows(job, json.loads(found.read_text())))

    def lose(self, problem: BaseException) -> None:
        """The ranks are gone: leave out who was at work, or the job if that was nobody."""
        self.collect()
        reason = why(problem)
        told = self.folder / PROGRESS
        at = json.loads(told.read_text()) if told.is_file() else {"job": "", "contender": ""}
        jobs = [job for job in self.left if job.name == at["job"]] or self.left[:1]
        if at["contender"] and at["contender"] not in self.excluded:
            self.excluded[at["contender"]] = f"in {at['job']}: {reason}"
            print(f"{at['contender']} {self.excluded[at['contender']]}", flush=True)
            return
        for job in jobs:
            names = self._names(job)
            self._keep(job, [failed_row(name, reason, self.ranks) for name in names])

    def _names(self, job: Job) -> list[str]:
        if job.routing is None:
            return [LAYER_ROW]
        return [case_name(way, job.shape, job.routing) for way in WAYS]  # type: ignore[arg-type]

    def _rows(self, job: Job, said: dict[str, Any]) -> list[Row]:
        if job.routing is None:
            return [layer_row(said, job.shape, self.ranks)]
        return case_rows(job.shape, job.routing, said, self.ranks)  # type: ignore[arg-type]

    def _keep(self, job: Job, rows: list[Row]) -> None:
        self.left.remove(job)
        rows = [row | self._origin for row in rows if _wanted(row["name"], self._patterns)]
        if self.ranks != 2:  # what the goals are about
            rows = [row | {"name": f"{row['name']}/W{self.ranks}"} for row in rows]
        print("\n".join(map(shown, rows)), flush=True)
        if self._saves:
            save("dispatch", rows)


def why(problem: BaseException) -> str:
    """One line: of a traceback, the last one."""
    lines = str(problem).strip().splitlines() or [type(problem).__name__]
    return lines[-1].strip()[:200]


def _wanted(name: str, patterns: list[str]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def _jobs(shapes: Sequence[Any], layer: Any, patterns: list[str]) -> list[Job]:
    """What the goals are about first: even routing, then the layer, then the other routings."""

    def cases(routings: Sequence[str]) -> list[Job]:
        return [
            Job(f"{s[0]}x{s[1]}.{routing}", s, routing)
            for s in shapes
            for routing in routings
            if any(_wanted(case_name(way, s, routing), patterns) for way in WAYS)
        ]

    layers = [Job("layer", layer, None)] if _wanted(LAYER_ROW, patterns) else []
    return [*cases(ROUTINGS[:1]), *layers, *cases(ROUTINGS[1:])]


def _numbers(text: str) -> Any:
    return tuple(map(int, text.split(",")))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="*", help="rows by shell pattern, several by commas")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--shape", type=_numbers, help="T,D,K,E in the place of the three")
    parser.add_argument("--layer", type=_numbers, default=LAYER, help="T,D,F,E,K of weak scaling")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="in each of 5 rounds")
    parser.add_argument("--seconds", type=float, default=600, help="nothing is begun after them")
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--timeline", type=Path, metavar="FILE", help="profile --layer instead")
    args = parser.parse_args(arguments)
    if args.timeline:
        with tempfile.TemporaryDirectory() as folder:
            where = (args.ranks, local_device(args.ranks), args.layer, folder)
            return draw_timeline(args.timeline, *where)
    end = time.monotonic() + args.seconds
    patterns = args.only.split(",")
    jobs = _jobs([args.shape] if args.shape else list(SHAPES), args.layer, patterns)
    with tempfile.TemporaryDirectory() as folder:
        table = Table(jobs, Path(folder), args.ranks, patterns, args.save)
        while table.left and time.monotonic() < end:
            how = (list(table.left), table.excluded, args.samples, folder, end - time.monotonic())
            kind = local_device(args.ranks)
            try:
                run_here(args.ranks, kind, measure_jobs, *how, meanwhile=table.collect)
                table.collect()
                break
            except ProcessException as problem:
                table.lose(problem)
    for job in table.left:
        print(f"{job.name}: no time left", flush=True)


if __name__ == "__main__":
    main()
