"""Rows to each rank and back, differentiable: each way is the gradient of the other."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
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

    def out(self, x_TD: Tensor, rows: Rows, also: Sequence[Tensor], splits: Splits, told: Tensor
    ) -> list[Tensor]:  # fmt: skip
        """Each row's token to its rank, and `also`, (R, ...) each, with it."""
        ...

    def home(self, parts: Sequence[Tensor], splits: Splits, told: Tensor) -> list[Tensor]:
        """(N, ...) each back to where the N rows came from: (R, ...) each."""
        ...


def exchange(x: Tensor, send: list[int], receive: list[int], group: Group) -> Tensor:
    """Rows to each rank out, rows from each rank in; no gradient."""
    out = x.new_empty((sum(receive), *x.shape[1:]))
    dist.all_to_all_single(out, x.contiguous(), receive, send, group=group)
    return out


@dataclass(frozen=True, slots=True)
class Collective:
    """Moves by all-to-all, over NCCL or gloo, which fails loudly by itself."""

    group: Group

    def out(self, x_TD: Tensor, rows: Rows, also: Sequence[Tensor], splits: Splits, told: Tensor
    ) -> list[Tensor]:  # fmt: skip
        x_RD = torch.ops.moe_router.gather(x_TD, rows.src_R, rows.row_TW)
        return [exchange(x, splits.send, splits.receive, self.group) for x in (x_RD, *also)]

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


def sum_rows(y_RD: Tensor, rows: Rows) -> Tensor:
    """(T, D): what came from each rank, added up in order of rank."""
    return torch.ops.moe_router.combine(y_RD, None, rows.src_R, rows.choice_R, rows.row_TW)  # type: ignore[no-any-return]


class Send(torch.autograd.Function):
    """Tokens, fp32 or fp64 weights, and ids to the experts; gradients of rows and weights return.

    One function for all three, so that every rank moves the same messages in the same order in
    backward, also a rank without experts, on which no gradient reaches the rows.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weight_RK: Tensor,
        id_RK: Tensor,
        rows: Rows,
        splits: Splits,
        mover: Mover,
        told: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.way = (rows, splits, mover, told)
        packed_RK = pack(weight_RK, id_RK)
        x_ND, packed_NK = mover.out(x_TD, rows, [packed_RK], splits, told)
        weight_NK, id_NK = unpack(packed_NK, weight_RK.dtype, id_RK.size(1))
        ctx.mark_non_differentiable(id_NK)
        return x_ND, weight_NK, id_NK

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, splits, mover, told = ctx.way
        grad_RD, grad_RK = mover.home(grads[:2], splits, told)
        return sum_rows(grad_RD, rows), grad_RK, None, None, None, None, None


class Return(torch.autograd.Function):
    """Results home and added up; their gradients go back to the experts."""

    @staticmethod
    def forward(
        ctx: Any, y_ND: Tensor, rows: Rows, splits: Splits, mover: Mover, told: Tensor
    ) -> Tensor:
        ctx.way = (rows, splits, mover, told)
        (home_RD,) = mover.home([y_ND], splits, told)
        return sum_rows(home_RD, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, splits, mover, told = ctx.way
        (grad_ND,) = mover.out(grads[0], rows, [], splits, told)
        return grad_ND, None, None, None, None
