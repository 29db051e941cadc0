"""Rows to each rank and back, differentiable: each way is the gradient of the other."""

from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from moe_router.dispatch.base import Group
from moe_router.dispatch.travel import Home, Travel, Wait, finish, home_after
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
    ) -> tuple[Tensor, Tensor, Tensor, Travel]:
        """Each row's token to its rank, which may still be on its way, and `packed_RP` with it:
        its first `bits` columns, and the others.

        Args:
            keep: a gradient will be asked for, so what came must outlive the next exchange.
        """
        ...

    def out(self, x_TD: Tensor, rows: Rows, splits: Splits, told: Tensor) -> Tensor:
        """Each row's token to its rank."""
        ...

    def home(self, y_ND: Tensor, splits: Splits, told: Tensor) -> Tensor:
        """The N rows back to where they came from: (R, D), valid until the next exchange."""
        ...


def exchange(x: Tensor, send: list[int], receive: list[int], group: Group) -> Tensor:
    """Rows to each rank out, rows from each rank in; no gradient."""
    out = x.new_empty((sum(receive), *x.shape[1:]))
    dist.all_to_all_single(out, x.contiguous(), receive, send, group=group)
    return out


def start_exchange(
    x: Tensor, send: list[int], receive: list[int], group: Group
) -> tuple[Tensor, Wait]:
    """`exchange`, and what to call before the rows are used."""
    x, out = x.contiguous(), x.new_empty((sum(receive), *x.shape[1:]))
    work = dist.all_to_all_single(out, x, receive, send, group=group, async_op=True)
    return out, partial(finish, work, x)


@dataclass(frozen=True, slots=True)
class Collective:
    """Moves by all-to-all, over NCCL or gloo, which fails loudly by itself."""

    group: Group

    def start_out(
        self, x_TD: Tensor, rows: Rows, bits: int, splits: Splits, told: Tensor, keep: bool
    ) -> tuple[Tensor, Tensor, Tensor, Travel]:
        send, receive, group = way = (splits.send, splits.receive, self.group)
        packed_NP = exchange(rows.packed_RP, *way)
        x_RD = gathered(x_TD, rows)
        x_ND, wait = start_exchange(x_RD, *way)

        def start_home(grad_ND: Tensor, grad_NK: Tensor) -> Home:
            coming = start_exchange(grad_ND, receive, send, group)
            return home_after(*coming, lambda: exchange(grad_NK, receive, send, group))

        # a single row would keep the stride of `packed_NP`, which no wider dtype can view
        bits_NK = packed_NP[:, :bits].flatten().view(-1, bits)
        return x_ND, bits_NK, packed_NP[:, bits:].contiguous(), Travel(wait, start_home)

    def out(self, x_TD: Tensor, rows: Rows, splits: Splits, told: Tensor) -> Tensor:
        return exchange(gathered(x_TD, rows), splits.send, splits.receive, self.group)

    def home(self, y_ND: Tensor, splits: Splits, told: Tensor) -> Tensor:
        return exchange(y_ND, splits.receive, splits.send, self.group)


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
        started.append(travel)
        ctx.rows, ctx.travel = rows, travel
        ctx.mark_non_differentiable(id_NK)
        return x_ND, bits_NK.view(weight_TK.dtype), id_NK

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows = ctx.rows
        grad_RD, grad_RK = ctx.travel.come_home(*grads[:2])
        return sum_rows(grad_RD, rows), of_choices(grad_RK, rows), *[None] * 5


class Return(torch.autograd.Function):
    """Results home and added up; their gradients go back to the experts."""

    @staticmethod
    def forward(ctx: Any, y_ND: Tensor, rows: Rows, splits: Splits, mover: Mover) -> Tensor:
        ctx.way = (rows, splits, mover)
        return sum_rows(mover.home(y_ND, splits, rows.overflow), rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, splits, mover = ctx.way
        return mover.out(grads[0], rows, splits, rows.overflow), None, None, None
