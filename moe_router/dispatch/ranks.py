"""Ranks in new processes on this machine: one for each GPU over NCCL, or on the CPU over gloo."""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.multiprocessing.spawn import spawn

_GRACE_S = 5.0  # between a failure and the end of the other ranks


def local_device(ranks: int) -> str:
    """cuda where each rank has a GPU, else cpu."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return "cuda" if gpus >= ranks else "cpu"


def run_here(
    ranks: int,
    kind: str,
    function: Callable[..., Any],
    *args: object,
    meanwhile: Callable[[], None] = lambda: None,
) -> Any:
    """`function(device, *args)` on every rank of a fresh default process group.

    Args:
        kind: cpu or cuda.
        function: of a module, so that another process finds it.
        meanwhile: called about every second while they run; what it raises ends them.

    Returns:
        What it returned on rank 0, as JSON has it.

    Raises:
        torch.multiprocessing.ProcessException: a rank failed; the others are ended.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        given = (ranks, store.port, kind, str(answer), function, args)
        context = spawn(_rank, given, nprocs=ranks, join=False)  # type: ignore[no-untyped-call]
        try:
            while not context.join(1.0, _GRACE_S):
                meanwhile()
        finally:
            for process in context.processes:
                process.kill()  # nothing, where it has ended
                process.join()
        return json.loads(answer.read_text())


def _rank(
    rank: int,
    ranks: int,
    port: int,
    kind: str,
    answer: str,
    function: Callable[..., Any],
    args: tuple[object, ...],
) -> None:
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # multicast stays off, as for peer memory
    else:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        torch.set_num_threads(1)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo",
        store=TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False),
        rank=rank,
        world_size=ranks,
        device_id=device if kind == "cuda" else None,
    )
    result = function(device, *args)
    if rank == 0:
        Path(answer).write_text(json.dumps(result))
    dist.destroy_process_group()
