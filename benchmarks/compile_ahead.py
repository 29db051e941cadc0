"""Compile the peers' tuning candidates on all cores, before anything is timed.

    python -m benchmarks.compile_ahead --peers DIR --out ready.json --workers 12 --seconds 120

Whole tuning grids, never trimmed: each worker compiles its share into Triton's cache, at few
tokens and few experts, which are no part of a kernel's key. A peer is left out of the shapes whose
grid was not compiled in time. SonicMoE compiles its candidates in workers of its own.
"""

import argparse
import json
import multiprocessing
import multiprocessing.connection
import site
import time
from collections.abc import Callable
from typing import Any

TUNED = ("moe_ops", "liger")


def quick_tuning() -> None:
    """Triton's tuner times each candidate over a few launches instead of 125 ms of them."""
    from triton.runtime import driver
    from triton.testing import do_bench

    def bench(run: Callable[[], Any], quantiles: tuple[float, ...]) -> Any:
        return do_bench(run, warmup=1, rep=6, quantiles=quantiles)

    driver.active.get_benchmarker = lambda: bench


def _share(worker: int, workers: int) -> None:
    """Let tuners see every workers-th candidate, run once."""
    from triton.runtime import driver
    from triton.runtime.autotuner import Autotuner

    whole = Autotuner.prune_configs

    def part(self: Any, kwargs: Any) -> Any:
        candidates = whole(self, kwargs)
        return candidates[worker::workers] or candidates[:1]

    def once(run: Callable[[], Any], quantiles: Any) -> list[float]:
        run()
        return [1.0] * len(quantiles)

    Autotuner.prune_configs = part
    driver.active.get_benchmarker = lambda: once


def _work(folder: str, worker: int, workers: int, jobs: list[Any], pipe: Any) -> None:
    site.addsitedir(folder)
    import torch

    from benchmarks.layer_check import make_layer
    from benchmarks.peers import load

    _share(worker, workers)
    for name, shape in jobs:
        _, D, F, E, K = shape
        layer = make_layer((256, D, F, min(E, 16), K))
        try:
            call = load(name).layer(layer, True)  # type: ignore[operator]
            torch.autograd.grad(call.run(), call.leaves, layer.grad_TD)
        except Exception as problem:  # seen again, and recorded, when it is timed
            print(f"{name} {shape}: {type(problem).__name__}: {str(problem)[:100]}", flush=True)
        del layer
        torch.cuda.empty_cache()
        pipe.send((name, shape))
    pipe.close()


def compile_all(folder: str, workers: int, seconds: float, jobs: list[Any]) -> dict[str, list[str]]:
    """By peer, the shapes that are not compiled when the time is over."""
    context = multiprocessing.get_context("spawn")
    end = time.monotonic() + seconds
    done = dict.fromkeys(jobs, 0)
    pipes: list[Any] = []
    processes = []
    for worker in range(workers):
        ours, theirs = context.Pipe(False)
        process = context.Process(target=_work, args=(folder, worker, workers, jobs, theirs))
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    while pipes and time.monotonic() < end:
        for ready in multiprocessing.connection.wait(pipes, timeout=1):
            pipe: Any = ready
            try:
                done[pipe.recv()] += 1
            except EOFError:
                pipes.remove(pipe)
    for process in processes:
        process.terminate()
        process.join()
    left: dict[str, list[str]] = {name: [] for name, _ in jobs}
    for (name, shape), count in done.items():
        if count < workers:
            left[name].append("/".join(map(str, shape)))
    return left


def main() -> None:
    from benchmarks.kernel_shapes import LAYERS

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--peers", required=True)
    parser.add_argument("--with", dest="contenders", default=",".join(TUNED))
    parser.add_argument("--out", required=True)
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=120)
    args = parser.parse_args()
    # small layers first: more of them are done when the time is over
    shapes = sorted(LAYERS, key=lambda shape: shape[1] * shape[2])
    jobs = [(name, shape) for name in args.contenders.split(",") for shape in shapes]
    left = compile_all(args.peers, args.workers, args.seconds, jobs)
    print(f"not compiled: {left}")
    with open(args.out, "w") as out:
        json.dump(left, out)


if __name__ == "__main__":
    main()
