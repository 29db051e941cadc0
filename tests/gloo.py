"""Real ranks for tests: processes that live as long as the test session and form groups.

    run_ranks(2, work.function, arg)      # function(rank, ranks, arg) on each, results by rank

The function must be importable by its module's name; a process group is formed before it runs,
and destroyed after it.
"""

import atexit
import importlib
import os
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT_S = 60.0
_workers: list[tuple[Any, Connection]] = []
_store: dist.TCPStore | None = None
_generation = 0


def run_ranks(
    ranks: int, function: Callable[..., Any], *args: Any, backend: str = "gloo"
) -> list[Any]:
    """Run `function(rank, ranks, *args)` on `ranks` processes; re-raises the first error.

    With backend "nccl" rank r owns GPU r, and CPU tensors still go through gloo.
    """
    global _generation
    _generation += 1
    port = _ready(ranks)
    for rank in range(ranks):
        where = (rank, ranks, port, _generation, backend)
        call = (where, function.__module__, function.__name__, args)
        _workers[rank][1].send(call)
    answers = [_answer(rank) for rank in range(ranks)]
    for rank, (error, result) in enumerate(answers):
        if error is not None:
            raise AssertionError(f"rank {rank}:\n{error}") from result
    return [result for _, result in answers]


def _answer(rank: int) -> tuple[str | None, Any]:
    process, pipe = _workers[rank]
    if not pipe.poll(2 * TIMEOUT_S):
        close()
        raise AssertionError(f"rank {rank} gave no answer in {2 * TIMEOUT_S} s")
    try:
        answer: tuple[str | None, Any] = pipe.recv()
    except EOFError:
        close()
        raise AssertionError(f"rank {rank} died with exit code {process.exitcode}") from None
    return answer


def _ready(ranks: int) -> int:
    """Enough workers; the port of the store where they meet."""
    global _store
    if _store is None:
        _store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        atexit.register(close)
    context = get_context("spawn")
    while len(_workers) < ranks:
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, list(sys.path)), daemon=True)
        process.start()
        theirs.close()
        _workers.append((process, ours))
    return _store.port


def close() -> None:
    """End all workers; the next call starts new ones."""
    for process, pipe in _workers:
        pipe.close()
        process.kill()
        process.join()
    _workers.clear()


def _serve(pipe: Connection, path: list[str]) -> None:
    sys.path[:] = path
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    while True:
        try:
            where, module, name, args = pipe.recv()
        except EOFError:
            return
        try:
            _join(*where)
            result = getattr(importlib.import_module(module), name)(*where[:2], *args)
            pipe.send((None, result))
        except Exception as error:  # whatever it is, the test must see it
            pipe.send((traceback.format_exc(), error))
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


def _join(rank: int, ranks: int, port: int, generation: int, backend: str) -> None:
    if backend == "nccl":
        torch.cuda.set_device(rank)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    dist.init_process_group(
        "gloo" if backend == "gloo" else "cpu:gloo,cuda:nccl",
        store=dist.PrefixStore(f"run{generation}", store),
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=TIMEOUT_S),
        device_id=None if backend == "gloo" else torch.device("cuda", rank),
    )
