"""Every rank sees all tokens and computes those that chose it; results are summed on the way home.

An all-gather and a reduce-scatter of static shapes: no counts, no wait of the host. The best
simple transport on two ranks, where nearly every token has an expert on both. The sum over ranks
is the collective's, in the dtype of the rows: on more than two ranks 16-bit sums round more often
than the others' fp32 ones do.
"""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_router.dispatch.base import Arrived, Dispatcher, Group, Received
from moe_router.dispatch.exchange import pack, unpack
from moe_router.dispatch.travel import Home, Travel, Wait, finish, home_after
from moe_router.dispatch.where import Tables, pad, plan_within, rows_of_experts
from moe_router.placement import Placement
from moe_router.types import Choice, Plan

# torch 2.13 renamed both, and its predecessors have only the old names
_gather_all = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_sum_apart = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_gather(x: Tensor, ranks: int, group: Group) -> Tensor:
    """The rows of every rank, in order of rank; no gradient."""
    out = x.new_empty((ranks * x.size(0), *x.shape[1:]))
    _gather_all(out, x.contiguous(), group=group)
    return out


def reduce_scatter(x: Tensor, ranks: int, group: Group) -> Tensor:
    """This rank's part of the rows, summed over ranks; no gradient."""
    out = x.new_empty((x.size(0) // ranks, *x.shape[1:]))
    _sum_apart(out, x.contiguous(), group=group)
    return out


def start_all_gather(x: Tensor, ranks: int, group: Group) -> tuple[Tensor, Wait]:
    """`all_gather`, and what to call before the rows are used."""
    out = x.new_empty((ranks * x.size(0), *x.shape[1:]))
    work = _gather_all(out, x.contiguous(), group=group, async_op=True)
    return out, partial(finish, work, x)


def start_reduce_scatter(x: Tensor, ranks: int, group: Group) -> tuple[Tensor, Wait]:
    """`reduce_scatter`, and what to call before the rows are used."""
    x, out = x.contiguous(), x.new_empty((x.size(0) // ranks, *x.shape[1:]))
    work = _sum_apart(out, x, group=group, async_op=True)
    return out, partial(finish, work, x)


class _Share(torch.autograd.Function):
    """Weights and ids to all ranks, then rows, which go on travelling; gradients of rows and
    weights are summed home."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weight_TK: Tensor,
        id_TK: Tensor,
        ranks: int,
        group: Group,
        started: list[Travel],
    ) -> tuple[Tensor, Tensor, Tensor]:
        packed = all_gather(pack(weight_TK, id_TK), ranks, group)
        x_ND, wait = start_all_gather(x_TD, ranks, group)

        def start_home(grad_ND: Tensor, grad_NK: Tensor) -> Home:
            coming = start_reduce_scatter(grad_ND, ranks, group)
            return home_after(*coming, lambda: reduce_scatter(grad_NK, ranks, group))

        ctx.travel = Travel(wait, start_home)
        started.append(ctx.travel)
        weight_NK, id_NK = unpack(packed, weight_TK.dtype, id_TK.size(1))
        ctx.mark_non_differentiable(id_NK)
        return x_ND, weight_NK, id_NK

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.travel.come_home(*grads[:2]), *[None] * 4


class _SumHome(torch.autograd.Function):
    """Results summed home; their gradients go to all ranks."""

    @staticmethod
    def forward(ctx: Any, y_ND: Tensor, ranks: int, group: Group) -> Tensor:
        ctx.way = (ranks, group)
        return reduce_scatter(y_ND, ranks, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return all_gather(grads[0], *ctx.way), None, None


class GatherScatter(Dispatcher):
    """Args:
    tokens: the most tokens of one rank, equal on all of them; a rank with fewer pads.
    factor: rows of a rank's experts, as a multiple of what even routing fills; at least 1.
    group: the ranks; None is the default process group.
    """

    def __init__(self, tokens: int, factor: float = 2.0, group: Group = None) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.ranks = dist.get_world_size(group)
        self._tokens, self._factor = tokens, factor
        self._tables = Tables(self.rank)

    def dispatch(
        self,
        x_TD: Tensor,
        choice: Choice,
        plan: Plan,
        placement: Placement,
        first_token: int = 0,
    ) -> Received:
        tokens, (T, K) = self._tokens, choice.target_TK.shape
        rank_TK, slot_TK = self._tables.find(choice, plan, placement, first_token)
        most = max(map(len, placement.experts_of_rank))
        id_TK = torch.add(slot_TK, rank_TK, alpha=most)  # below 0 where nobody serves a choice
        started: list[Travel] = []
        x_ND, weight_NK, id_NK = _Share.apply(  # type: ignore[no-untyped-call]
            pad(x_TD, tokens), pad(choice.weight_TK, tokens), pad(id_TK, tokens, -1),
            self.ranks, self.group, started,
        )  # fmt: skip
        id_NK = id_NK - self.rank * most
        elsewhere_NK = (id_NK < 0) | (id_NK >= most)
        id_NK = id_NK.masked_fill(elsewhere_NK, -1)
        weight_NK = weight_NK.masked_fill(elsewhere_NK, 0.0)
        held = len(placement.experts_of_rank[self.rank])
        bound = (tokens, placement, self.rank, K, self.ranks * tokens, self._factor)
        local, too_few = plan_within(id_NK, held, rows_of_experts(*bound))
        overflow = id_NK.new_full((), int(tokens < T))
        if too_few is not None:
            overflow |= too_few

        def arrive() -> Arrived:
            here_ND, here_NK, _ = started[0].arrive(x_ND, weight_NK, id_NK)
            return Arrived(here_ND, Choice(id_NK, here_NK), local)

        return Received(x_ND, arrive, T, overflow)

    def combine(self, y_ND: Tensor, received: Received) -> Tensor:
        home_TD = _SumHome.apply(y_ND, self.ranks, self.group)  # type: ignore[no-untyped-call]
        return pad(home_TD, received.handle)

    def total(self, x: Tensor) -> Tensor:
        summed = x.clone()
        dist.all_reduce(summed, group=self.group)
        return summed
