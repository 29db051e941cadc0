"""Inboxes in symmetric memory: each GPU writes into the others' over NVLink. See `inbox.py`.

Rows are put on a stream of their own, beside what runs until they are met. The host waits for
nothing; how long a kernel may look for a flag is bounded.
"""

import itertools
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_router.dispatch.base import Group
from moe_router.dispatch.inbox import HEADER, Message

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
        self._bytes = symmetric.empty(HEADER + capacity, dtype=torch.uint8, device=device)
        self._bytes[:HEADER].zero_()
        torch.cuda.synchronize(device)  # the flags are 0 before a peer can write one
        everyone = group or dist.group.WORLD
        assert everyone is not None
        self._handle = symmetric.rendezvous(self._bytes, everyone)
        pointers = list(self._handle.buffer_ptrs)
        self._peers_W = torch.tensor(pointers, dtype=torch.int64, device=device)
        self._flags = self._bytes[:HEADER].view(torch.int64)
        self._epoch = torch.zeros((), dtype=torch.int64, device=device)
        self._places: dict[Any, tuple[Tensor, Tensor]] = {}
        stream: Any = torch.cuda.Stream  # its constructor has no types
        self._aside = stream(device, priority=-1)  # what others wait for starts first
        self._sent: tuple[Any, ...] = ()

    def put(self, message: Message, told: Tensor) -> None:
        from moe_router_kernels import peer

        send, at, device = message.send, message.at, message.x.device
        key = (tuple(send), tuple(at))
        if key not in self._places:
            start_W1 = torch.tensor([0, *itertools.accumulate(send)], dtype=torch.int32)
            at_W = torch.tensor(at, dtype=torch.int32)
            self._places[key] = (start_W1.to(device), at_W.to(device))
        x, also = message.x.contiguous(), message.also
        also = None if also is None else also.contiguous()
        own = (self._peers_W, self._flags, self._epoch, told, self._places[key])
        self._aside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._aside):
            peer.put(
                x, message.src_R, also, message.split, *own,
                most=max(send), offsets=message.offsets, rank=self._rank, bound=self._bound,
            )  # fmt: skip
        self._sent = (x, message.src_R, also, told)  # nobody may have this memory until `meet`

    def meet(self, told: Tensor) -> None:
        from moe_router_kernels import peer

        own = (self._peers_W, self._flags, self._epoch, told)
        torch.cuda.current_stream(told.device).wait_stream(self._aside)
        self._sent = ()
        peer.meet(*own, rank=self._rank, bound=self._bound)

    def view(self, rows: int, columns: int, dtype: torch.dtype, offset: int) -> Tensor:
        begin = HEADER + offset
        flat = self._bytes[begin : begin + rows * columns * dtype.itemsize]
        return flat.view(dtype).view(rows, columns)
