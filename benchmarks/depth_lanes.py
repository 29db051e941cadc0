"""Trainings of benchmarks.dense_routing side by side: a run is a process, as far as no other has to
be there before it.
"""

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from itertools import groupby
from multiprocessing import get_context
from pathlib import Path

from benchmarks.depth_bench import Bench, TimeOver, one_thread
from benchmarks.depth_files import elsewhere
from benchmarks.depth_tasks import Setting, settings
from benchmarks.results import Row
from benchmarks.timing import Deadline
from moe_router.training.data import LabelledDataset


@dataclass(frozen=True, slots=True)
class Lane:
    """One run, as another process can make it.

    Attributes:
        folder: of the task's files.
        more: keys of the config.
        until: nothing is trained after it.
        dataset: of texts, read once: tokens of IMDB take ten seconds. Others are read in no time.
    """

    task: str
    runs: Path
    folder: Path
    more: tuple[str, ...]
    device: str
    scale: float
    until: Deadline
    dataset: LabelledDataset | None = None
    row: str = ""
    seed: int = 0

    @property
    def label(self) -> str:
        return f"{self.task}/{self.row}, seed {self.seed}"


def known(old: Mapping[str, Row], name: str, bench: Bench) -> dict[int, Row]:
    """What a saved row has of each seed, if it is of the same steps and sizes."""
    row = old.get(name, {})
    same = row.get("of") == bench.about
    return {int(seed): of for seed, of in row["by_seed"].items()} if same else {}


def bench_of(lane: Lane) -> Bench:
    """What the lane's run is made by."""
    return Bench(
        lane.task, lane.runs, lane.more, lane.device, scale=lane.scale, until=lane.until,
        elsewhere=elsewhere(lane.task, lane.folder), dataset=lane.dataset,
    )  # fmt: skip


def with_data(lane: Lane, bench: Bench) -> Lane:
    """The lane with what has been read for it, if that is worth sending."""
    data = bench.dataset
    return replace(lane, dataset=data if isinstance(data, LabelledDataset) else None)


def stage(setting: Setting) -> int:
    """Runs of a stage need those of the stages before it alone."""
    if setting.equal_to is not None:
        return 2
    return 0 if setting.start is None else 1


def needed(bench: Bench, rows: Sequence[str]) -> list[Setting]:
    """The settings of rows, their rivals and what they begin with, each once."""
    of = {s.name: s for s in settings(bench.task)}
    names = [n for row in rows for n in (of[row].start, of[row].rival, row) if n is not None]
    return [of[name] for name in dict.fromkeys(["dense", *names])]


def run_lanes(lanes: Sequence[tuple[int, Lane]], workers: int) -> None:
    """Train and measure these runs, stage by stage, as far as time goes; what is found lies beside
    the checkpoints. A run that fails is told, and costs what needs it alone.

    Args:
        lanes: each with its stage.
    """
    pool = None if workers == 1 else _pool(workers)
    for _, group in groupby(sorted(lanes, key=lambda lane: lane[0]), key=lambda lane: lane[0]):
        if pool is None:
            for _, lane in group:
                print(run_lane(lane), flush=True)
        elif not _run_side_by_side(pool, [lane for _, lane in group]):
            pool.shutdown()
            pool = _pool(workers)
    if pool is not None:
        pool.shutdown()  # what is timed afterwards has the machine for itself


def _pool(workers: int) -> ProcessPoolExecutor:
    # a new interpreter each: the device cannot be used on both sides of a fork
    return ProcessPoolExecutor(workers, mp_context=get_context("spawn"))


def _run_side_by_side(pool: ProcessPoolExecutor, lanes: list[Lane]) -> bool:
    """Whether no process was killed."""
    futures = [pool.submit(run_lane, lane) for lane in lanes]
    broken = False
    for lane, future in zip(lanes, futures, strict=True):
        try:
            print(future.result(), flush=True)
        except BrokenProcessPool as error:
            broken = True
            print(f"{lane.label}: {error}", flush=True)
    return not broken


def run_lane(lane: Lane) -> str:
    """In a process of its own. Returns: what came of it."""
    one_thread()
    began = time.monotonic()
    try:
        bench = bench_of(lane)
        of = {s.name: s for s in settings(bench.task)}
        found = bench.measured(of[lane.row], lane.seed)
    except TimeOver as error:
        return f"{error}: the time is over"
    except Exception as error:  # whatever it is, other runs go on; the row is missing, and says so
        return f"{lane.label}: {type(error).__name__}: {error}"
    return f"{time.monotonic() - began:6.1f} s: {lane.label}: {found['quality']:.4f}"
