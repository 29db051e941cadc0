"""What each rank of the dispatch benchmark runs: check, then time all contenders in turn."""

import faulthandler
import json
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import timing
from benchmarks.dispatch_contenders import MAKERS, Contender, draw
from moe_router.dispatch.link import Link, Problem, choose, measure

ROUNDS, SAMPLES = 5, 20  # samples of a contender in each of the interleaved rounds
GRAPH_TOKENS = 256  # up to so many, launches cost more than bytes: measured as CUDA graphs
JOB_S = 100  # a job that takes longer hangs: its ranks end, and say where they were
PROGRESS = "progress"
Run = Callable[[], Any]
Shape = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class Job:
    """A shape T, D, K, E with a routing; without one, a layer T, D, F, E, K."""

    name: str
    shape: tuple[int, ...]
    routing: str | None


class Ranks:
    """What the ranks of a benchmark agree on, over gloo: nothing of it touches a GPU.

    Args:
        folder: rank 0 writes there who is at work, and what was measured.
        excluded: contenders that are not to take part, and why.
    """

    def __init__(self, folder: str, excluded: dict[str, str]) -> None:
        self._folder, self._excluded, self._job = Path(folder), excluded, ""

    def begin(self, job: str) -> None:
        self._job = job
        self.at_work("")

    def at_work(self, contender: str) -> None:
        if dist.get_rank() == 0:
            self._write(PROGRESS, {"job": self._job, "contender": contender})

    def say(self, found: object) -> None:
        if dist.get_rank() == 0:
            self._write(f"{self._job}.json", found)

    def attempt(self, contender: str, run: Callable[[], Any]) -> tuple[Any, str]:
        """What run returns, and "", or None and why there is nothing: the same on all ranks."""
        if contender in self._excluded:
            return None, self._excluded[contender]
        self.at_work(contender)
        found, reason = None, ""
        try:
            found = run()
        except Exception as problem:  # whatever a contender raises is its line in the table
            lines = str(problem).strip().splitlines() or [""]
            reason = f"{type(problem).__name__}: {lines[0][:200]}"
        failed = torch.tensor(int(bool(reason)))
        dist.all_reduce(failed)
        if failed and not reason:
            reason = "failed on another rank"
        return (None if reason else found), reason

    def time_is_up(self, end: float) -> bool:
        over = torch.tensor(int(time.monotonic() > end))
        dist.broadcast(over, 0)
        return bool(over)

    def _write(self, name: str, found: object) -> None:
        partial = self._folder / f"{name}.tmp"
        partial.write_text(json.dumps(found))
        os.replace(partial, self._folder / name)


def measure_jobs(
    device: torch.device,
    jobs: list[Job],
    excluded: dict[str, str],
    samples: int,
    folder: str,
    seconds: float,
) -> None:
    """Measure each job, and write what was found to folder/NAME.json."""
    from benchmarks.dispatch_layer import measure_layer

    end = time.monotonic() + seconds
    ranks = Ranks(folder, excluded)
    link, copied = None, 0.0
    for job in jobs:
        if ranks.time_is_up(end):
            break
        ranks.begin(job.name)
        _watch(device)
        if not copied:
            link = measure(device) if device.type == "cuda" else None
            copied = copy_rate(device)
        if job.routing is None:
            ranks.say(measure_layer(device, job.shape, samples, ranks, link))
        else:
            found = _measure_case(device, job.shape, job.routing, samples, ranks)  # type: ignore[arg-type]
            chosen = chosen_by(link, job.shape)  # type: ignore[arg-type]
            ranks.say(found | {"chosen": chosen, "copy_bytes_per_s": copied})
    ranks.begin("")
    _watch(device)  # the end of a process group may hang too


def _watch(device: torch.device) -> None:
    """What hangs on a GPU hangs for ever: end this rank in time, and say where it was."""
    if device.type == "cuda":
        faulthandler.dump_traceback_later(JOB_S, exit=True)


def chosen_by(link: Link | None, shape: Shape) -> str:
    """What the chooser takes; without a link, on CPUs, nothing has to be measured."""
    T, D, K, E = shape
    return choose(link, Problem(T, K, E, link.ranks, D, 2)) if link else "all_to_all"


def _measure_case(
    device: torch.device, shape: Shape, routing: str, samples: int, ranks: Ranks
) -> dict[str, Any]:
    """By contender: microseconds of the slowest rank, or why there are none."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    case = draw(routing, shape, dtype, device)
    found: dict[str, Any] = {}
    runs: dict[tuple[str, str], Run] = {}
    with torch.no_grad():
        for name, make in MAKERS.items():

            def prepare(name: str = name, make: Callable[..., Contender] = make) -> Any:
                return _prepare(name, make(case), device)

            ready, reason = ranks.attempt(name, prepare)
            wrong, about, ways = ready or (reason, {}, {})
            found[name] = {"correct": not wrong, "reason": wrong, "dispatch": [], "combine": []}
            found[name] |= about
            runs |= {(name, way): run for way, run in ways.items()}
        for _ in range(ROUNDS):
            for (name, way), run in runs.items():
                ranks.at_work(name)
                found[name][way] += slowest(run, device, samples)
    ranks.at_work("")
    sent = (case.visits_T.sum() - _at_home(case)).double()
    most = sent.clone()
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return {
        "contenders": found,
        "remote_bytes": int(most) * case.x_TD.size(1) * case.x_TD.element_size(),
    }


def _prepare(
    name: str, contender: Contender, device: torch.device
) -> tuple[str, dict[str, Any], dict[str, Run]]:
    """What is wrong with a contender's rows, what a dispatch of it costs, and what to time."""
    reason = contender.obstacle()
    if reason:
        return reason, {}, {}
    static = name not in ("all_to_all", "plain all-to-all")
    graph = device.type == "cuda" and static and contender.case.most <= GRAPH_TOKENS
    about = _costs(contender, device) | {"graph": graph}
    out, back = _runs(contender, graph)
    return "", about, {"dispatch": out, "combine": back}


def _at_home(case: Any) -> torch.Tensor:
    """Tokens with an expert on their own rank."""
    mine = list(case.placement.experts_of_rank[dist.get_rank()])
    held = torch.isin(case.choice.target_TK, torch.tensor(mine, device=case.x_TD.device))
    return held.any(1).sum()


def _runs(contender: Contender, graph: bool) -> tuple[Run, Run]:
    """Dispatch, and combine of what it received."""
    state = contender.dispatch()
    y_ND = contender.result(state).clone()
    out, back = contender.dispatch, lambda: contender.combine(y_ND, state)
    return (timing.capture(out), timing.capture(back)) if graph else (out, back)


def _costs(contender: Contender, device: torch.device) -> dict[str, Any]:
    """Bytes that a dispatch holds at its peak, and how often it waits for the device."""
    if device.type != "cuda":
        return {"buffer_bytes": None, "host_syncs": None}
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        contender.dispatch()
        torch.cuda.set_sync_debug_mode("default")
    syncs = sum("synchroniz" in str(w.message) for w in caught)
    held = torch.cuda.max_memory_allocated(device) - before
    return {"buffer_bytes": held + contender.inbox_bytes, "host_syncs": syncs}


def slowest(run: Run, device: torch.device, times: int) -> list[float]:
    """Microseconds of each run, begun together, of the slowest rank."""
    gpu = device.type == "cuda"
    start = torch.zeros((), device=device)
    took = []
    for turn in range(times + 1):
        dist.all_reduce(start)
        if gpu:
            torch.cuda.synchronize(device)
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            first.record()
            run()
            last.record()
            torch.cuda.synchronize(device)
            micros = first.elapsed_time(last) * 1e3
        else:
            began = time.perf_counter()
            run()
            micros = (time.perf_counter() - began) * 1e6
        if turn:  # the first one warms up
            took.append(micros)
    worst = torch.tensor(took, dtype=torch.float64, device=device)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    samples: list[float] = worst.tolist()
    return samples


def copy_rate(device: torch.device, nbytes: int = 64 << 20) -> float:
    """Bytes per second of one copy to the neighbour's GPU; on CPUs, of a copy in memory."""
    source = torch.empty(nbytes if device.type == "cuda" else nbytes // 16, dtype=torch.int8)
    source = source.to(device)
    other = device
    if device.type == "cuda":
        other = torch.device("cuda", (dist.get_rank() + 1) % dist.get_world_size())
    target = source.to(other)
    took = sorted(slowest(lambda: target.copy_(source), device, 10))
    return source.nbytes / took[len(took) // 2] * 1e6
