"""Memory that peers write into: on GPUs symmetric memory, on CPUs files that processes share.

An inbox has a flag for each source and two regions that are used in turn. An exchange is: put rows
into the peers' inboxes, signal, wait for every peer's signal, take. One signal each way is enough:

    rank s puts epoch e        only after it has seen every peer's signal of e - 1
    peer d signals e - 1       only after it has taken epoch e - 2
    so epoch e overwrites      e - 2, of the same region, which d no longer needs
"""

import itertools
import math
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from moe_router.dispatch.base import Group
from moe_router.errors import ConfigError, PeerLostError

HEADER = 4096  # bytes of flags, as in moe_router_kernels.peer


class Inbox(Protocol):
    """What `PeerMover` needs of it. Offsets are bytes inside a region."""

    capacity: int

    def put(
        self, x: Tensor, src_R: Tensor | None, send: list[int], at: list[int], offset: int
    ) -> None:
        """send[w] rows of x (or of x[src_R]) to row at[w] of a part of rank w's region."""
        ...

    def signal(self) -> None:
        """What was put is whole."""
        ...

    def wait(self, told: Tensor) -> None:
        """Until every peer has signalled, with a bound.

        Raises:
            PeerLostError: one has not, where the host can tell; else `told` becomes not 0.
        """
        ...

    def take(self, rows: int, like: Tensor, offset: int) -> Tensor:
        """(rows, ...) copied out of the own region, shaped and typed as `like`'s rows."""
        ...


class SharedInbox:
    """Emulates peer memory between processes of one machine: the protocol's proof on a CPU.

    Args:
        rank: of this process.
        paths: the file of each rank; each makes its own, of `size(capacity)` bytes of 0, and
            must have done so before this.
        capacity: bytes of a region.
        timeout_s: until a peer that does not signal is lost.
    """

    def __init__(self, rank: int, paths: list[Path], capacity: int, timeout_s: float) -> None:
        if platform.machine() not in ("x86_64", "AMD64"):
            raise ConfigError(
                f"cluster.transport=peer_memory on a CPU of kind {platform.machine()}: want one "
                "that shows stores in order, x86-64; take all_to_all"
            )
        self.capacity = capacity
        self._rank, self._timeout_s = rank, timeout_s
        nbytes = self.size(capacity)
        self._bytes = [
            torch.from_file(str(p), shared=True, size=nbytes, dtype=torch.uint8) for p in paths
        ]
        self._flags = [of[:HEADER].view(torch.int64)[: len(paths)] for of in self._bytes]
        self._epoch = 0

    @staticmethod
    def size(capacity: int) -> int:
        return HEADER + 2 * capacity

    @classmethod
    def form(cls, capacity: int, timeout_s: float, group: Group) -> "SharedInbox":
        """One for each rank of a group on one machine; all must ask together."""
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        name = torch.tensor(int.from_bytes(os.urandom(7), "big"))
        dist.broadcast(name, group_src=0, group=group)
        shared = Path("/dev/shm")
        folder = shared if os.access(shared, os.W_OK) else Path(tempfile.gettempdir())
        paths = [folder / f"moe_router_{int(name):x}_{r}" for r in range(ranks)]
        # truncate leaves a file of zeros
        with paths[rank].open("wb") as own:
            own.truncate(cls.size(capacity))
        try:
            dist.barrier(group=group)
            inbox = cls(rank, paths, capacity, timeout_s)
            dist.barrier(group=group)  # all have mapped it: the name is no longer needed
        finally:
            paths[rank].unlink(missing_ok=True)
        return inbox

    def put(
        self, x: Tensor, src_R: Tensor | None, send: list[int], at: list[int], offset: int
    ) -> None:
        rows = x if src_R is None else x[src_R.clamp(min=0)]
        starts = [0, *itertools.accumulate(send)]
        for peer, (first, last) in enumerate(itertools.pairwise(starts)):
            self._part(peer, self._epoch + 1, at[peer], last - first, x, offset).copy_(
                rows[first:last]
            )

    def signal(self) -> None:
        self._epoch += 1
        for flags_W in self._flags:
            flags_W[self._rank] = self._epoch

    def wait(self, told: Tensor) -> None:
        deadline = time.monotonic() + self._timeout_s
        own_W = self._flags[self._rank]
        while bool((own_W < self._epoch).any()):
            if time.monotonic() > deadline:
                silent = (own_W < self._epoch).nonzero()[:, 0].tolist()
                raise PeerLostError(
                    f"rank {self._rank}, exchange {self._epoch}: no signal of rank "
                    f"{', '.join(map(str, silent))} in {self._timeout_s:g} s; form the group anew"
                )
            time.sleep(1e-5)  # the peer may need this core

    def take(self, rows: int, like: Tensor, offset: int) -> Tensor:
        return self._part(self._rank, self._epoch, 0, rows, like, offset).clone()

    def _part(
        self, peer: int, epoch: int, first: int, rows: int, like: Tensor, offset: int
    ) -> Tensor:
        width = row_bytes(like)
        begin = HEADER + epoch % 2 * self.capacity + offset + first * width
        flat = self._bytes[peer][begin : begin + rows * width]
        return flat.view(like.dtype).view(rows, *like.shape[1:])


def row_bytes(x: Tensor) -> int:
    """Bytes of a row, also where there is none."""
    return math.prod(x.shape[1:]) * x.element_size()
