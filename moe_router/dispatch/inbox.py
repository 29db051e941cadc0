"""Memory that peers write into: on GPUs symmetric memory, on CPUs files that processes share.

An inbox has two flags for each source and one region. An exchange is `put`, then `meet`, of all
ranks in the same order:

    put     say to all "I read nothing in my inbox any more"; wait until all have; write the rows
    meet    say to all "my rows are whole"; wait until all have

So rows may be read where they lie until this rank's next exchange, and no longer.
"""

import itertools
import os
import platform
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from moe_router.dispatch.base import Group
from moe_router.errors import ConfigError, WorkerLostError

HEADER = 4096  # bytes of flags, as in moe_router_kernels.peer
_HALF = HEADER // 8 // 2


@dataclass(frozen=True, slots=True)
class Message:
    """Rows for all ranks, and where they go.

    Attributes:
        x: (T, D).
        src_R: int32, the row of x in each slot, -1 for none; None: R rows of x in order.
        also: (R, P) int32, what goes with each slot; None: nothing.
        split: the first so many columns of `also` are one part, the others the next.
        send: slots for each rank, one rank's behind the other's.
        at: where they begin in the parts of rank w.
        offsets: bytes: where x and the parts of `also` begin in a region.
    """

    x: Tensor
    src_R: Tensor | None
    also: Tensor | None
    split: int
    send: list[int]
    at: list[int]
    offsets: tuple[int, int, int]


class Inbox(Protocol):
    """What `PeerMover` needs of it."""

    capacity: int

    def put(self, message: Message, told: Tensor) -> None:
        """Write rows into the peers' regions, once they read nothing there any more.

        Raises:
            WorkerLostError: a peer has not said so in time, where the host can tell; else `told`
                becomes not 0, and nothing is written.
        """
        ...

    def meet(self, told: Tensor) -> None:
        """Until every peer's rows are whole. Raises or tells as `put` does."""
        ...

    def view(self, rows: int, columns: int, dtype: torch.dtype, offset: int) -> Tensor:
        """(rows, columns) of the own region, from `offset` bytes on: valid until the next put."""
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
        self._flags = [of[:HEADER].view(torch.int64).view(2, _HALF) for of in self._bytes]
        self._epoch = 0

    @staticmethod
    def size(capacity: int) -> int:
        return HEADER + capacity

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

    def put(self, message: Message, told: Tensor) -> None:
        self._tell(0)
        self._hear(0)
        x, src_R, also = message.x, message.src_R, message.also
        parts = [] if also is None else [also[:, : message.split], also[:, message.split :]]
        starts = [0, *itertools.accumulate(message.send)]
        for peer, (first, last) in enumerate(itertools.pairwise(starts)):
            rows = x[first:last] if src_R is None else self._filled(x, src_R[first:last])
            own = (part[first:last] for part in parts)
            for part, offset in zip((rows, *own), message.offsets, strict=False):
                begin = offset + message.at[peer] * part.size(1) * part.element_size()
                self._part(peer, begin, len(part), part).copy_(part)

    def meet(self, told: Tensor) -> None:
        self._tell(1)
        self._hear(1)
        self._epoch += 1

    def view(self, rows: int, columns: int, dtype: torch.dtype, offset: int) -> Tensor:
        return self._part(self._rank, offset, rows, torch.empty(0, columns, dtype=dtype))

    @staticmethod
    def _filled(x: Tensor, src_R: Tensor) -> Tensor:
        """Rows fill a rank's slots from the first on; an empty slot keeps what it has."""
        return x[src_R[: int((src_R >= 0).sum())]]

    def _tell(self, half: int) -> None:
        for flags in self._flags:
            flags[half, self._rank] = self._epoch + 1

    def _hear(self, half: int) -> None:
        deadline, pause = time.monotonic() + self._timeout_s, 1e-5
        own_W = self._flags[self._rank][half, : len(self._flags)]
        while bool((own_W <= self._epoch).any()):
            if time.monotonic() > deadline:
                silent = (own_W <= self._epoch).nonzero()[:, 0].tolist()
                raise WorkerLostError(
                    f"rank {self._rank}, exchange {self._epoch + 1}: no signal of rank "
                    f"{', '.join(map(str, silent))} in {self._timeout_s:g} s; form the group anew"
                )
            time.sleep(pause)  # the peer may need this core, the more so the longer it takes
            pause = min(2 * pause, 1e-3)

    def _part(self, peer: int, offset: int, rows: int, like: Tensor) -> Tensor:
        begin, width = HEADER + offset, like.size(1) * like.element_size()
        flat = self._bytes[peer][begin : begin + rows * width]
        return flat.view(like.dtype).view(rows, like.size(1))
