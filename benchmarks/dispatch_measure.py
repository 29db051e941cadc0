"""What each rank of the dispatch benchmark runs: check, then time all contenders in turn."""

import faulthandler
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import timing
from benchmarks.dispatch_contenders import MAKERS, Case, Contender, draw
from benchmarks.dispatch_ranks import Ranks
from moe_router.dispatch.cost_model import Link, Problem
from moe_router.dispatch.link import choose, measure

ROUNDS, SAMPLES = 5, 20  # samples of a contender in each of the interleaved rounds
GRAPH_TOKENS = 256  # up to so many, launches cost more than bytes: a CUDA graph is the value
SYNCING = ("all_to_all", "plain all-to-all")  # no graph can hold them
JOB_S = 100  # a job that takes longer hangs: its ranks end, and say where they were
Run = Callable[[], Any]
Shape = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class Job:
    """A shape T, D, K, E with a routing; without one, a layer T, D, F, E, K."""

    name: str
    shape: tuple[int, ...]
    routing: str | None


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
            ready, reason = ranks.attempt(name, partial(_prepare, make, case, device))
            wrong, about, ways = ready or (reason, {}, {})
            found[name] = {"correct": not wrong, "reason": wrong, "dispatch": [], "combine": []}
            found[name] |= about
            if ways and device.type == "cuda" and name not in SYNCING:
                graphs, reason = ranks.attempt(f"{name}, as a graph", partial(_graphs, ways))
                small = case.most <= GRAPH_TOKENS
                ways = (graphs or ways) if small else ways | _beside(graphs or {})
                found[name] |= {"graph": small and not reason, "graph_reason": reason}
            found[name] |= {way: [] for way in ways}
            runs |= {(name, way): run for way, run in ways.items()}
        for _ in range(ROUNDS):
            for (name, way), run in runs.items():
                ranks.at_work(f"{name}, as a graph" if way.endswith("_graph") else name)
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
    make: Callable[[Case], Contender], case: Case, device: torch.device
) -> tuple[str, dict[str, Any], dict[str, Run]]:
    """What is wrong with a contender's rows, what a dispatch of it costs, and what to time."""
    contender = make(case)
    reason = contender.obstacle()
    if reason:
        return reason, {}, {}
    return "", _costs(contender, device), _runs(contender)


def _at_home(case: Case) -> torch.Tensor:
    """Tokens with an expert on their own rank."""
    mine = list(case.placement.experts_of_rank[dist.get_rank()])
    held = torch.isin(case.choice.target_TK, torch.tensor(mine, device=case.x_TD.device))
    return held.any(1).sum()


def _runs(contender: Contender) -> dict[str, Run]:
    """Dispatch, and combine of what it received."""
    state = contender.dispatch()
    y_ND = contender.result(state).clone()
    return {"dispatch": contender.dispatch, "combine": lambda: contender.combine(y_ND, state)}


def _graphs(runs: dict[str, Run]) -> dict[str, Run]:
    return {way: timing.capture(run) for way, run in runs.items()}


def _beside(graphs: dict[str, Run]) -> dict[str, Run]:
    """By names that stand beside those of the same work launched by the host."""
    return {f"{way}_graph": run for way, run in graphs.items()}


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
