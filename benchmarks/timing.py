"""Timing: contenders in turn, medians with p90; on a GPU with cold caches."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

Run = Callable[[], Any]
BUSY_CYCLES = 2_000_000  # about a millisecond
FLUSH_BYTES = 256 << 20  # five times the L2 of an H100


@dataclass(frozen=True, slots=True)
class Timing:
    """Microseconds."""

    median: float
    p90: float


def capture(run: Run) -> Run:
    """The same work as one CUDA graph."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()  # compiles, tunes and allocates outside of the capture
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # NCCL's watchdog may ask for its events meanwhile
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        run()
    return partial(_replay, graph, run)


def _replay(graph: Any, reads: Run) -> None:
    """A graph holds addresses alone: what it reads lives as long as the run it was made of."""
    graph.replay()


def interleave(runs: dict[str, Run], *, rounds: int, idle: bool = False) -> dict[str, Timing]:
    """Time all contenders in turn, each sample after the L2 cache was overwritten.

    Args:
        idle: the GPU waits for the host before each sample, so that the time holds what the host
            needs to launch; else the GPU is kept busy meanwhile, which hides the launches.

    Without a GPU it is the time on the host.
    """
    if not torch.cuda.is_available():
        return _on_host(runs, rounds)
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    samples: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs)
    for turn in range(rounds):
        shift = turn % len(order)
        for name in order[shift:] + order[:shift]:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            flush.zero_()
            if idle:
                torch.cuda.synchronize()
            else:
                torch.cuda._sleep(BUSY_CYCLES)  # type: ignore[no-untyped-call]
            start.record()
            runs[name]()
            end.record()
            torch.cuda.synchronize()
            samples[name].append(start.elapsed_time(end) * 1e3)
    return {name: summary(of) for name, of in samples.items()}


def _on_host(runs: dict[str, Run], rounds: int) -> dict[str, Timing]:
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            samples[name].append((time.perf_counter() - began) * 1e6)
    return {name: summary(of) for name, of in samples.items()}


def summary(samples: Sequence[float]) -> Timing:
    ordered = sorted(samples)
    return Timing(
        statistics.median(ordered), ordered[min(len(ordered) - 1, len(ordered) * 9 // 10)]
    )


def matmul_ceiling() -> float:
    """TFLOP/s of a dense bf16 product of 8192^3 by cuBLAS."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    interleave({"": lambda: a @ a}, rounds=3)
    return 2 * 8192**3 / interleave({"": lambda: a @ a}, rounds=20)[""].median / 1e6


def copy_ceiling() -> float:
    """GB/s of a device copy, bytes read and written."""
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    interleave({"": lambda: target.copy_(source)}, rounds=3)
    took = interleave({"": lambda: target.copy_(source)}, rounds=20)[""].median
    return 2 * source.numel() * 4 / took / 1e3


class Deadline:
    """Seconds left of a run; a row is not begun once they are over."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def over(self) -> bool:
        return time.monotonic() > self._end
