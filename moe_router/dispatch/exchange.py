"""Rows to each rank and back, differentiable: each way is the gradient of the other."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
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

    def start_out(
        self, x_TD: Tensor, rows: Rows, also: Sequence[Tensor], splits: Splits, told: Tensor
    ) -> tuple[list[Tensor], "Travel | None"]:
        """`out`, but tokens may still be on their way."""
        ...

    def home(self, parts: Sequence[Tensor], splits: Splits, told: Tensor) -> list[Tensor]:
        """(N, ...) each back to where the N rows came from: (R, ...) each."""
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
    return out, partial(_finish, work, x)


def _finish(work: Any, sent: Tensor) -> None:
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
        self, x_TD: Tensor, rows: Rows, also: Sequence[Tensor], splits: Splits, told: Tensor
    ) -> tuple[list[Tensor], Travel | None]:
        way = (splits.send, splits.receive, self.group)
        small = [exchange(x, *way) for x in also]
        x_RD = torch.ops.moe_router.gather(x_TD, rows.src_R, rows.row_TW)
        x_ND, wait = start_exchange(x_RD, *way)
        send, receive, group = way

        def start_home(grad_ND: Tensor) -> tuple[Tensor, Wait]:
            return start_exchange(grad_ND, receive, send, group)

        return [x_ND, *small], Travel(wait, start_home)

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
        started: list[Travel],
    ) -> tuple[Tensor, Tensor, Tensor]:
        packed_RK = pack(weight_RK, id_RK)
        (x_ND, packed_NK), travel = mover.start_out(x_TD, rows, [packed_RK], splits, told)
        if travel is not None:
            started.append(travel)
        ctx.way, ctx.travel = (rows, splits, mover, told), travel
        weight_NK, id_NK = unpack(packed_NK, weight_RK.dtype, id_RK.size(1))
        ctx.mark_non_differentiable(id_NK)
        return x_ND, weight_NK, id_NK

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, splits, mover, told = ctx.way
        grad_RD = None if ctx.travel is None else ctx.travel.come_home()
        if grad_RD is None:
            grad_RD, grad_RK = mover.home(grads[:2], splits, told)
        else:
            (grad_RK,) = mover.home(grads[1:2], splits, told)
        return sum_rows(grad_RD, rows), grad_RK, *[None] * 6


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
