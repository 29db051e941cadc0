"""Trainings of benchmarks.dense_routing side by side: a task's runs of one seed are one process."""

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from benchmarks.depth_bench import Bench, TimeOver, one_thread
from benchmarks.depth_files import elsewhere
from benchmarks.depth_tasks import settings
from benchmarks.results import Row
from benchmarks.timing import Deadline


@dataclass(frozen=True, slots=True)
class Lane:
    """What one process trains, one row after another.

    Attributes:
        folder: of the task's files.
        more: keys of the config.
        until: nothing is trained after it.
        old: rows saved before, by name.
    """

    task: str
    runs: Path
    folder: Path
    more: tuple[str, ...]
    device: str
    scale: float
    until: Deadline
    rows: tuple[str, ...]
    seed: int
    old: Mapping[str, Row]


def known(old: Mapping[str, Row], name: str, bench: Bench) -> dict[int, Row]:
    """What a saved row has of each seed, if it is of the same steps and sizes."""
    row = old.get(name, {})
    same = row.get("of") == bench.about
    return {int(seed): of for seed, of in row["by_seed"].items()} if same else {}


def bench_of(lane: Lane) -> Bench:
    """What the lane's runs are made by; its data is read."""
    return Bench(
        lane.task, lane.runs, lane.more, lane.device,
        scale=lane.scale, until=lane.until, elsewhere=elsewhere(lane.task, lane.folder),
    )  # fmt: skip


def run_lanes(lanes: Sequence[Lane], workers: int) -> None:
    """Train and measure what the rows of these lanes need, as far as time goes; what is found lies
    beside the checkpoints."""
    if workers == 1:
        for lane in lanes:
            run_lane(lane)
        return
    # a new interpreter each: the device cannot be used on both sides of a fork
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for _ in pool.map(run_lane, lanes):
            pass


def run_lane(lane: Lane) -> None:
    """In a process of its own."""
    one_thread()
    began = time.monotonic()
    bench = bench_of(lane)
    of = {s.name: s for s in settings(bench.task)}
    rivals = [of[name].rival for name in lane.rows]
    for name in dict.fromkeys([*rivals, *lane.rows]):
        if lane.seed in known(lane.old, f"{lane.task}/{name}", bench):
            continue
        try:
            found = bench.measured(of[name], lane.seed)
        except TimeOver as error:
            print(f"{error}: the time is over", flush=True)
            return
        at = time.monotonic() - began
        print(
            f"{at:6.1f} s: {lane.task}/{name}, seed {lane.seed}: {found['quality']:.4f}", flush=True
        )
