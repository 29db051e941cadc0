"""Rows are written straight into the memory of the rank that needs them: slots as in `padded`, no
collective, no count, no wait of the host.

Not covered: ranks on several machines. A peer that does not signal in time is a WorkerLostError on
a CPU; on a GPU it raises the overflow flag, and the step is taken again by host splits, which fail
loudly if the peer is gone.
"""

from functools import partial
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor

from moe_router.dispatch.base import Group
from moe_router.dispatch.exchange import Splits
from moe_router.dispatch.inbox import Inbox, Message, SharedInbox
from moe_router.dispatch.padded import Padded
from moe_router.dispatch.symmetric import SymmetricInbox
from moe_router.dispatch.travel import Home, Travel, Wait, home_after
from moe_router.dispatch.where import Rows

_ALIGN = 128  # bytes, between parts of a message


class PeerMover:
    """Moves static splits through inboxes. Its order of exchanges is the same on all ranks.

    Args:
        rank: in the group.
        timeout_s: until a peer that does not signal is lost.
    """

    def __init__(self, rank: int, group: Group, timeout_s: float) -> None:
        self._rank, self._group, self._timeout_s = rank, group, timeout_s
        self.inbox: Inbox | None = None

    def start_out(
        self, x_TD: Tensor, rows: Rows, bits: int, splits: Splits, told: Tensor, keep: bool
    ) -> tuple[Tensor, Tensor, Tensor, Travel]:
        """Rows, ids and weights are one exchange: all of it is on its way until it is waited for.
        What is not kept stays where it came, and may be read until the next exchange."""

        def start_home(grad_ND: Tensor, grad_NK: Tensor) -> Home:
            words = grad_NK.contiguous().view(torch.int32)
            found, wait = self._start_home(grad_ND, words, splits, told)
            return home_after(found[0], wait, lambda: found[1].view(grad_NK.dtype))

        found, wait = self._start_out(x_TD, rows, rows.packed_RP, bits, splits, told)
        x_ND, bits_NK, id_NK = found
        return x_ND, bits_NK, id_NK, Travel(wait, start_home, with_ids=True, keep=keep)

    def out(self, x_TD: Tensor, rows: Rows, splits: Splits, told: Tensor) -> Tensor:
        (x_ND, *_), wait = self._start_out(x_TD, rows, None, 0, splits, told)
        wait()
        return x_ND.clone()

    def home(self, y_ND: Tensor, splits: Splits, told: Tensor) -> Tensor:
        (home_RD, *_), wait = self._start_home(y_ND, None, splits, told)
        wait()
        return home_RD

    def _start_home(
        self, x: Tensor, also: Tensor | None, splits: Splits, told: Tensor
    ) -> tuple[list[Tensor], Wait]:
        at = [sum(splits.send[: self._rank])] * len(splits.send)
        wide = 0 if also is None else also.size(1)
        way = (splits.receive, at, sum(splits.send))
        return self._start(x, None, also, wide, splits, way, told)

    def _start_out(
        self, x_TD: Tensor, rows: Rows, also: Tensor | None, bits: int, splits: Splits, told: Tensor
    ) -> tuple[list[Tensor], Wait]:
        at = [self._rank * n for n in splits.send]
        way = (splits.send, at, sum(splits.receive))
        return self._start(x_TD, rows.src_R, also, bits, splits, way, told)

    def _start(
        self,
        x: Tensor,
        src_R: Tensor | None,
        also: Tensor | None,
        split: int,
        splits: Splits,
        way: tuple[list[int], list[int], int],
        told: Tensor,
    ) -> tuple[list[Tensor], Wait]:
        """Where the rows that come will lie, and the two parts of what comes with them; and what
        to call before they are read."""
        send, at, rows = way
        # of any rank and either way, so that all lay their parts out alike
        most = max(len(splits.send) * max(splits.send), sum(splits.send))
        wide = 0 if also is None else also.size(1)
        kinds = [(x.size(1), x.dtype), (split, torch.int32), (wide - split, torch.int32)]
        sizes = [-(-most * n * dtype.itemsize // _ALIGN) * _ALIGN for n, dtype in kinds]
        first, second, third, end = accumulate(sizes, initial=0)
        offsets = (first, second, third)
        inbox = self.ready(end, x.device)
        inbox.put(Message(x, src_R, also, split, send, at, offsets), told)
        views = [inbox.view(rows, *kind, start) for kind, start in zip(kinds, offsets, strict=True)]
        return views, partial(inbox.meet, told)

    def ready(self, nbytes: int, device: torch.device) -> Inbox:
        """An inbox of at least so many bytes. It grows on all ranks at once, for all know sizes."""
        if self.inbox is None or self.inbox.capacity < nbytes:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
                dist.barrier(group=self._group)  # nobody writes into the old one any more
                self.inbox = SymmetricInbox(nbytes, self._timeout_s, self._group)
            else:
                self.inbox = SharedInbox.form(nbytes, self._timeout_s, self._group)
        return self.inbox


class PeerMemory(Padded):
    """Args:
    tokens, factor, group: as of `Padded`.
    timeout_s: until a peer that does not signal is lost.
    """

    def __init__(
        self, tokens: int, factor: float = 2.0, group: Group = None, *, timeout_s: float = 60.0
    ) -> None:
        super().__init__(tokens, factor, group)
        self._mover: PeerMover = PeerMover(self.rank, group, timeout_s)

    @property
    def inbox_bytes(self) -> int:
        """What the peers write into, of this rank's memory."""
        inbox = self._mover.inbox
        return 0 if inbox is None else inbox.capacity
