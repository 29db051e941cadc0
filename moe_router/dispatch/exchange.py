"""Rows to each rank and back, differentiable: each way is the gradient of the other."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from moe_router.dispatch.base import Group
from moe_router.dispatch.where import Rows


@dataclass(frozen=True, slots=True)
class Splits:
    """How many rows travel.

    Attributes:
        send, receive: rows to and from each rank, known to the host.
        send_W: `send` on the device.
        experts: a bound on the rows of all experts here.
    """

    send: list[int]
    receive: list[int]
    send_W: Tensor
    experts: int


class Mover(Protocol):
    """Moves rows between ranks; no gradient. `told` is an int32 scalar on the device, not 0 once
    something was lost on the way."""

    def start_out(
        self, x_TD: Tensor, rows: Rows, bits: int, splits: Splits, told: Tensor, keep: bool
    ) -> tuple[Tensor, Tensor, Tensor, "Travel | None"]:
        """Each row's token to its rank, which may still be on its way, and `packed_RP` with it:
        its first `bits` columns, and the others.

        Args:
            keep: a gradient will be asked for, so what came must outlive the next exchange.
        """
        ...

    def out(self, x_TD: Tensor, rows: Rows, splits: Splits, told: Tensor) -> Tensor:
        """Each row's token to its rank."""
        ...

    def home(self, parts: Sequence[Tensor], splits: Splits, told: Tensor) -> list[Tensor]:
        """(N, ...) each back to where the N rows came from: (R, ...) each, valid until the next
        exchange. At most two: rows, and 4 or 8 bytes for each of their choices."""
        ...


def exchange(x: Tensor, send: list[int], receive: list[int], group: Group) -> Tensor:
    """Rows to each rank out, rows from each rank in; no gradient."""
    out = x.new_empty((sum(receive), *x.shape[1:]))
    dist.all_to_all_single(out, x.contiguous(), receive, send, group=group)
    return out


Wait = Callable[[], object]


def start_exchange(
    x: Tensor, send: list[int], receive: list[int], group: Group
) -> tuple[Tensor, Wait]:
    """`exchange`, and what to call before the rows are used."""
    x, out = x.contiguous(), x.new_empty((sum(receive), *x.shape[1:]))
    work = dist.all_to_all_single(out, x, receive, send, group=group, async_op=True)
    return out, partial(finish, work, x)


def finish(work: Any, sent: Tensor) -> None:
    """The sent rows are kept until here."""
    work.wait()


class Travel:
    """Rows on their way out, and later their gradients on the way home.

    Args:
        wait: for the rows out.
        start_home: sets the gradients off: they, and what to call before they are used.
    """

    def __init__(self, wait: Wait, start_home: Callable[[Tensor], tuple[Tensor, Wait]]) -> None:
        self._wait: Wait | None = wait
        self.start_home = start_home
        self._home: tuple[Tensor, Wait] | None = None

    def arrive(self, coming_ND: Tensor) -> Tensor:
        here_ND: Tensor = _Arrive.apply(coming_ND, self)  # type: ignore[no-untyped-call]
        return here_ND

    def wait(self) -> None:
        """What was kept for the way is let go."""
        wait, self._wait = self._wait, None
        if wait is not None:
            wait()

    def set_off(self, grad_ND: Tensor) -> None:
        self._home = self.start_home(grad_ND)

    def come_home(self) -> Tensor | None:
        """The gradients; None where none ever set off: a rank whose rows nobody used."""
        if self._home is None:
            return None
        (grad, wait), self._home = self._home, None
        wait()
        return grad


class _Arrive(torch.autograd.Function):
    """Where rows are waited for, and where their gradients set off: what autograd recorded after
    the dispatch and before this, runs while they travel, in both directions."""

    @staticmethod
    def forward(ctx: Any, coming_ND: Tensor, travel: Travel) -> Tensor:
        ctx.travel = travel
        travel.wait()
        return coming_ND.view_as(coming_ND)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.travel.set_off(grads[0])
        return grads[0], None


@dataclass(frozen=True, slots=True)
class Collective:
    """Moves by all-to-all, over NCCL or gloo, which fails loudly by itself."""

    group: Group

    def start_out(
        self, x_TD: Tensor, rows: Rows, bits: int, splits: Splits, told: Tensor, keep: bool
    ) -> tuple[Tensor, Tensor, Tensor, Travel | None]:
        send, receive, group = way = (splits.send, splits.receive, self.group)
        packed_NP = exchange(rows.packed_RP, *way)
        x_RD = gathered(x_TD, rows)
        x_ND, wait = start_exchange(x_RD, *way)

        def start_home(grad_ND: Tensor) -> tuple[Tensor, Wait]:
            return start_exchange(grad_ND, receive, send, group)

        # a single row would keep the stride of `packed_NP`, which no wider dtype can view
        bits_NK = packed_NP[:, :bits].flatten().view(-1, bits)
        return x_ND, bits_NK, packed_NP[:, bits:].contiguous(), Travel(wait, start_home)

    def out(self, x_TD: Tensor, rows: Rows, splits: Splits, told: Tensor) -> Tensor:
        return exchange(gathered(x_TD, rows), splits.send, splits.receive, self.group)

    def home(self, parts: Sequence[Tensor], splits: Splits, told: Tensor) -> list[Tensor]:
        return [exchange(x, splits.receive, splits.send, self.group) for x in parts]


def pack(weight_RK: Tensor, id_RK: Tensor) -> Tensor:
    """Weights and ids as one int32 message; fp64 weights take two columns each."""
    return torch.cat([weight_RK.contiguous().view(torch.int32), id_RK], 1)


def unpack(packed: Tensor, dtype: torch.dtype, K: int) -> tuple[Tensor, Tensor]:
    """(N, K) weights of `dtype` and (N, K) int32 ids from what `pack` made."""
    bits, id_NK = torch.split(packed, [packed.size(1) - K, K], 1)
    # flat in between: a single row keeps the stride of `packed`, which no wider dtype can view
    return bits.flatten().view(dtype).view(-1, K), id_NK.contiguous()


def gathered(x_TD: Tensor, rows: Rows) -> Tensor:
    """(R, D): each row's token, zeros in an empty slot."""
    return torch.ops.moe_router.gather(x_TD, rows.src_R, rows.row_TW)  # type: ignore[no-any-return]


def sum_rows(y_RD: Tensor, rows: Rows) -> Tensor:
    """(T, D): what came from each rank, added up in order of rank."""
    ids = (rows.src_R, rows.src_R, rows.row_TW)
    return torch.ops.moe_router.combine(y_RD, None, *ids)  # type: ignore[no-any-return]


def of_choices(grad_RK: Tensor, rows: Rows) -> Tensor:
    """(T, K): what came for each choice, from the rank that serves it."""
    rank_TK = rows.rank_TK.long()
    row_TK = rows.row_TW.gather(1, rank_TK.clamp(min=0)).masked_fill(rank_TK < 0, -1).long()
    none = grad_RK.size(0)  # a row of zeros behind the last one
    return F.pad(grad_RK, (0, 0, 0, 1)).gather(0, torch.where(row_TK < 0, none, row_TK))


class Send(torch.autograd.Function):
    """Tokens, fp32 or fp64 weights, and ids to the experts; gradients of rows and weights return.

    One function for all three, so that every rank moves the same messages in the same order in
    backward, also a rank without experts, on which no gradient reaches the rows.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weight_TK: Tensor,
        rows: Rows,
        splits: Splits,
        mover: Mover,
        keep: bool,
        started: list[Travel],
    ) -> tuple[Tensor, Tensor, Tensor]:
        bits, told = rows.packed_RP.size(1) - weight_TK.size(1), rows.overflow
        found = mover.start_out(x_TD, rows, bits, splits, told, keep)
        x_ND, bits_NK, id_NK, travel = found
        if travel is not None:
            started.append(travel)
        ctx.way, ctx.travel = (rows, splits, mover, told), travel
        ctx.mark_non_differentiable(id_NK)
        return x_ND, bits_NK.view(weight_TK.dtype), id_NK

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, splits, mover, told = ctx.way
        grad_RD = None if ctx.travel is None else ctx.travel.come_home()
        if grad_RD is None:
            grad_RD, grad_RK = mover.home(grads[:2], splits, told)
        else:
            (grad_RK,) = mover.home(grads[1:2], splits, told)
        return sum_rows(grad_RD, rows), of_choices(grad_RK, rows), *[None] * 5


class Return(torch.autograd.Function):
    """Results home and added up; their gradients go back to the experts."""

    @staticmethod
    def forward(ctx: Any, y_ND: Tensor, rows: Rows, splits: Splits, mover: Mover) -> Tensor:
        ctx.way = (rows, splits, mover)
        (home_RD,) = mover.home([y_ND], splits, rows.overflow)
        return sum_rows(home_RD, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, splits, mover = ctx.way
        return mover.out(grads[0], rows, splits, rows.overflow), None, None, None
