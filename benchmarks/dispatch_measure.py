"""What each rank of the dispatch benchmark runs: check, then time all contenders in turn."""

import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import timing
from benchmarks.dispatch_contenders import MAKERS, Contender, draw
from moe_router import MoE, MoEConfig
from moe_router.dispatch import Bounded
from moe_router.dispatch.base import Dispatcher
from moe_router.dispatch.link import Problem, choose, measure
from moe_router.dispatch.transports import ALL, make_transport

ROUNDS, SAMPLES = 5, 20  # samples of a contender in each of the interleaved rounds
GRAPH_TOKENS = 256  # up to so many, launches cost more than bytes: measured as CUDA graphs
Run = Callable[[], Any]


def measure_shape(
    device: torch.device, shape: tuple[int, int, int, int], routings: list[str], samples: int
) -> dict[str, Any]:
    """By routing, then by contender: microseconds of the slowest rank, or why there are none."""
    T, D, K, E = shape
    itemsize = 2 if device.type == "cuda" else 4
    problem = Problem(T, K, E, dist.get_world_size(), D, itemsize)
    chosen = choose(measure(device), problem) if device.type == "cuda" else "all_to_all"
    same = {"chosen": chosen, "copy_bytes_per_s": copy_rate(device)}
    return {routing: _measure_case(device, shape, routing, samples) | same for routing in routings}


def _measure_case(
    device: torch.device, shape: tuple[int, int, int, int], routing: str, samples: int
) -> dict[str, Any]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    case = draw(routing, shape, dtype, device)
    found: dict[str, Any] = {}
    runs: dict[tuple[str, str], Run] = {}
    with torch.no_grad():
        for name, make in MAKERS.items():
            contender = make(case)
            reason = contender.obstacle()
            found[name] = {"correct": not reason, "reason": reason, "dispatch": [], "combine": []}
            if not reason:
                found[name] |= _costs(contender, device)
                static = name not in ("all_to_all", "plain all-to-all")
                graph = device.type == "cuda" and static and shape[0] <= GRAPH_TOKENS
                out, back = _runs(contender, graph)
                found[name]["graph"] = graph
                runs |= {(name, "dispatch"): out, (name, "combine"): back}
        for _ in range(ROUNDS):
            for (name, way), run in runs.items():
                found[name][way] += slowest(run, device, samples)
    sent = (case.visits_T.sum() - _at_home(case)).double()
    most = sent.clone()
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return {
        "contenders": found,
        "remote_bytes": int(most) * case.x_TD.size(1) * case.x_TD.element_size(),
    }


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
    return {
        "buffer_bytes": torch.cuda.max_memory_allocated(device) - before,
        "host_syncs": syncs,
    }


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


def measure_layer(
    device: torch.device, shape: tuple[int, int, int, int, int], samples: int = SAMPLES
) -> dict[str, Any]:
    """A MoE layer forward and backward, sharded over the ranks and alone: medians by name, us.

    Args:
        shape: tokens of a rank, D, F, E, K.
    """
    T, D, F, E, K = shape
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    config = MoEConfig(experts=E, top_k=K, hidden=F, balance_loss=0.01)
    problem = Problem(T, K, E, dist.get_world_size(), D, torch.finfo(dtype).bits // 8)
    chosen = choose(measure(device), problem) if device.type == "cuda" else "all_to_all"
    x_TD = torch.randn(T, D, device=device, dtype=dtype, requires_grad=True)

    def step(dispatcher: Dispatcher | None) -> Run:
        moe = MoE(D, config, dispatcher=dispatcher).to(device, dtype)

        def run() -> None:
            routed = moe(x_TD)
            (routed.delta_TD.sum() + moe.aux_loss(routed.choice)).backward()

        return run

    exact = make_transport("all_to_all", T, 2.0)
    took = {"alone": slowest(step(None), device, samples)}
    for name in ALL:
        by = Bounded(make_transport(name, T, 2.0), exact)  # type: ignore[arg-type]
        took[name] = slowest(step(by), device, samples)
    medians = {name: sorted(of)[len(of) // 2] for name, of in took.items()}
    return {"chosen": chosen, "medians": medians}
