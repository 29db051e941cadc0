"""Rows are written straight into the memory of the rank that needs them: slots as in `padded`, no
collective, no count, no wait of the host.

Not covered: ranks on several machines. A peer that does not signal in time is a PeerLostError on a
CPU; on a GPU it raises the overflow flag, and the step is taken again by host splits, which fail
loudly if the peer is gone.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from moe_router.dispatch.base import Group
from moe_router.dispatch.exchange import Splits, Travel
from moe_router.dispatch.inbox import Inbox, SharedInbox, row_bytes
from moe_router.dispatch.padded import Padded
from moe_router.dispatch.symmetric import SymmetricInbox
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
        self._inbox: Inbox | None = None

    def out(self, x_TD: Tensor, rows: Rows, also: Sequence[Tensor], splits: Splits, told: Tensor
    ) -> list[Tensor]:  # fmt: skip
        at = [self._rank * n for n in splits.send]
        parts = [(x_TD, rows.src_R), *((part, None) for part in also)]
        return self._exchange(parts, splits, splits.send, at, sum(splits.receive), told)

    def start_out(
        self, x_TD: Tensor, rows: Rows, also: Sequence[Tensor], splits: Splits, told: Tensor
    ) -> tuple[list[Tensor], Travel | None]:
        """Nothing is left on its way: rows, ids and weights are one exchange."""
        return self.out(x_TD, rows, also, splits, told), None

    def home(self, parts: Sequence[Tensor], splits: Splits, told: Tensor) -> list[Tensor]:
        at = [sum(splits.send[: self._rank])] * len(splits.send)
        plain = [(part, None) for part in parts]
        return self._exchange(plain, splits, splits.receive, at, sum(splits.send), told)

    def _exchange(
        self,
        parts: Sequence[tuple[Tensor, Tensor | None]],
        splits: Splits,
        send: list[int],
        at: list[int],
        rows: int,
        told: Tensor,
    ) -> list[Tensor]:
        # of any rank and either way, so that all lay their parts out alike
        most = max(len(splits.send) * max(splits.send), sum(splits.send))
        offsets, end = [], 0
        for x, _ in parts:
            offsets.append(end)
            end += -(-most * row_bytes(x) // _ALIGN) * _ALIGN
        inbox = self._ready(end, parts[0][0].device)
        for (x, src_R), offset in zip(parts, offsets, strict=True):
            inbox.put(x, src_R, send, at, offset)
        inbox.signal()
        inbox.wait(told)
        return [inbox.take(rows, x, at) for (x, _), at in zip(parts, offsets, strict=True)]

    def _ready(self, nbytes: int, device: torch.device) -> Inbox:
        """An inbox of at least so many bytes. It grows on all ranks at once, for all know sizes."""
        if self._inbox is None or self._inbox.capacity < nbytes:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
                dist.barrier(group=self._group)  # nobody writes into the old one any more
                self._inbox = SymmetricInbox(nbytes, self._timeout_s, self._group)
            else:
                self._inbox = SharedInbox.form(nbytes, self._timeout_s, self._group)
        return self._inbox


class PeerMemory(Padded):
    """Args:
    tokens, factor, group: as of `Padded`.
    timeout_s: until a peer that does not signal is lost.
    """

    def __init__(
        self, tokens: int, factor: float = 2.0, group: Group = None, *, timeout_s: float = 60.0
    ) -> None:
        super().__init__(tokens, factor, group)
        self._mover = PeerMover(self.rank, group, timeout_s)
