"""Inboxes in symmetric memory: each GPU writes into the others' over NVLink. See `inbox.py`.

The host waits for nothing; how long a kernel may look for a flag is bounded.
"""

import itertools
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_router.dispatch.base import Group
from moe_router.dispatch.inbox import HEADER

_LOOKS_PER_S = 1_000_000  # at a flag in the own memory, about


class SymmetricInbox:
    """Args:
    capacity: bytes of a region.
    timeout_s: about how long a kernel waits for a peer.
    group: of one machine; all its ranks must ask together.
    """

    def __init__(self, capacity: int, timeout_s: float, group: Group) -> None:
        # multicast is off on purpose, and Ray calls every actor's GPU 0
        os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
        os.environ.setdefault("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "1")
        import torch.distributed._symmetric_memory as symmetric

        self.capacity = capacity
        self._rank = dist.get_rank(group)
        self._bound = int(timeout_s * _LOOKS_PER_S)
        device = torch.device("cuda", torch.cuda.current_device())
        self._bytes = symmetric.empty(HEADER + 2 * capacity, dtype=torch.uint8, device=device)
        self._bytes[:HEADER].zero_()
        torch.cuda.synchronize(device)  # the flags are 0 before a peer can write one
        everyone = group or dist.group.WORLD
        assert everyone is not None
        self._handle = symmetric.rendezvous(self._bytes, everyone)
        pointers = list(self._handle.buffer_ptrs)
        self._peers_W = torch.tensor(pointers, dtype=torch.int64, device=device)
        self._flags_W = self._bytes[:HEADER].view(torch.int64)[: len(pointers)]
        self._epoch = torch.zeros((), dtype=torch.int64, device=device)
        self._places: dict[Any, tuple[Tensor, Tensor]] = {}

    def put(
        self, x: Tensor, src_R: Tensor | None, send: list[int], at: list[int], offset: int
    ) -> None:
        from moe_router_kernels import peer

        key = (tuple(send), tuple(at))
        if key not in self._places:
            starts = [0, *itertools.accumulate(send)][:-1]
            start_W, at_W = torch.tensor([starts, at], dtype=torch.int32, device=x.device)
            self._places[key] = (start_W, at_W)
        peer.put(
            x.contiguous(),
            src_R,
            self._peers_W,
            *self._places[key],
            self._epoch,
            rows=sum(send),
            offset=offset,
            region=self.capacity,
        )

    def signal(self) -> None:
        from moe_router_kernels import peer

        peer.signal(self._peers_W, self._epoch, self._rank)

    def wait(self, told: Tensor) -> None:
        from moe_router_kernels import peer

        peer.wait(self._flags_W, self._epoch, told, self._bound)

    def take(self, rows: int, like: Tensor, offset: int) -> Tensor:
        columns = like.size(1)
        words = self._bytes[HEADER:].view(like.dtype)
        size = like.element_size()
        strides = (self.capacity // size, columns, 1)
        both = words.as_strided(
            (2, rows, columns), strides, words.storage_offset() + offset // size
        )
        return both.index_select(0, self._epoch[None] & 1)[0]
