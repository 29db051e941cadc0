"""Uneven all-to-all with host splits, over NCCL or gloo: portable, one row per (token, rank).

Not covered: CUDA graphs (the splits are read by the host) and replicated experts.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_router.dispatch.base import Received
from moe_router.placement import Placement
from moe_router.routing.plan import plan_from_ids
from moe_router.types import Choice, Plan
from moe_router_kernels import combine, gather, reference

Group = dist.ProcessGroup | None


def exchange(x: Tensor, send: list[int], receive: list[int], group: Group) -> Tensor:
    """Rows to each rank out, rows from each rank in; no gradient."""
    out = x.new_empty((sum(receive), *x.shape[1:]))
    dist.all_to_all_single(out, x.contiguous(), receive, send, group=group)
    return out


class _Send(torch.autograd.Function):
    """Rows, fp32 or fp64 weights, and ids to the experts; gradients of rows and weights return.

    One function for all three, so that every rank runs the same collectives in the same order in
    backward, also a rank without experts, on which no gradient reaches the rows.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_RD: Tensor,
        weight_RK: Tensor,
        id_RK: Tensor,
        send: list[int],
        receive: list[int],
        group: Group,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.way = (send, receive, group)
        bits = weight_RK.view(torch.int32)  # twice as wide if the weights are fp64
        packed = exchange(torch.cat([bits, id_RK], 1), send, receive, group)
        weight_NK, id_NK = torch.split(packed, [bits.size(1), id_RK.size(1)], 1)
        id_NK = id_NK.contiguous()
        ctx.mark_non_differentiable(id_NK)
        x_ND = exchange(x_RD, send, receive, group)
        return x_ND, weight_NK.contiguous().view(weight_RK.dtype), id_NK

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        send, receive, group = ctx.way
        grad_RD = exchange(grads[0], receive, send, group)
        return grad_RD, exchange(grads[1], receive, send, group), None, None, None, None


class _Return(torch.autograd.Function):
    """Results home; their gradients go back to the experts."""

    @staticmethod
    def forward(
        ctx: Any, y_ND: Tensor, send: list[int], receive: list[int], group: Group
    ) -> Tensor:
        ctx.way = (send, receive, group)
        return exchange(y_ND, receive, send, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        send, receive, group = ctx.way
        return exchange(grads[0], send, receive, group), None, None, None


@dataclass(frozen=True, slots=True)
class _WayBack:
    plan: Plan  # over the ranks: groups are ranks, K is W
    send: list[int]
    receive: list[int]


class AllToAll:
    """Args:
    group: the ranks; None is the default process group.
    """

    def __init__(self, group: Group = None) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.ranks = dist.get_world_size(group)
        self._tables: dict[tuple[Placement, torch.device], tuple[Tensor, Tensor]] = {}

    def dispatch(self, x_TD: Tensor, choice: Choice, plan: Plan, placement: Placement) -> Received:
        rank_E, slot_E = self._table(placement, x_TD.device)
        kept_TK = torch.where(plan.row_TK >= 0, choice.target_TK, -1)
        rank_TK = torch.where(kept_TK >= 0, rank_E[kept_TK.clamp(min=0)], -1)
        to_ranks = self._plan_ranks(rank_TK)
        send, receive, choices = self._splits(to_ranks.rows_G, rank_TK)
        rows = sum(send)
        src_R = to_ranks.src_R[:rows]
        x_RD = gather(x_TD, src_R, to_ranks.row_TK)
        weight_RK = gather(choice.weight_TK, src_R, to_ranks.row_TK)
        # a row carries only the choices that live where it goes
        going_R = to_ranks.choice_R[:rows] % self.ranks
        here_RK = rank_TK[src_R] == going_R[:, None]
        id_RK = torch.where(here_RK, slot_E[kept_TK[src_R].clamp(min=0)], -1)
        weight_RK = weight_RK.masked_fill(~here_RK, 0.0)

        x_ND, weight_NK, id_NK = _Send.apply(  # type: ignore[no-untyped-call]
            x_RD, weight_RK, id_RK, send, receive, self.group
        )
        held = len(placement.experts_of_rank[self.rank])
        way_back = _WayBack(to_ranks, send, receive)
        local = plan_from_ids(id_NK, held, rows=choices)
        return Received(x_ND, Choice(id_NK, weight_NK), local, way_back)

    def combine(self, y_ND: Tensor, received: Received) -> Tensor:
        way = received.handle
        home_RD = _Return.apply(  # type: ignore[no-untyped-call]
            y_ND, way.send, way.receive, self.group
        )
        row_TW = way.plan.row_TK
        unit_TW = torch.ones(row_TW.shape, device=row_TW.device)
        rows = home_RD.size(0)
        return combine(home_RD, unit_TW, way.plan.src_R[:rows], way.plan.choice_R[:rows], row_TW)

    def total(self, x: Tensor) -> Tensor:
        summed = x.clone()
        dist.all_reduce(summed, group=self.group)
        return summed

    def _plan_ranks(self, rank_TK: Tensor) -> Plan:
        ranks_W = torch.arange(self.ranks, device=rank_TK.device, dtype=torch.int32)
        goes_TW = (rank_TK[..., None] == ranks_W).any(1)
        return plan_from_ids(torch.where(goes_TW, ranks_W, -1), self.ranks)

    def _splits(self, send_W: Tensor, rank_TK: Tensor) -> tuple[list[int], list[int], int]:
        """Rows to and from each rank, and how many choices they bring: read by the host."""
        send_W2 = torch.stack([send_W.long(), reference.count(rank_TK, self.ranks)], 1)
        receive_W2 = torch.empty_like(send_W2)
        dist.all_to_all_single(receive_W2, send_W2, group=self.group)
        (send, _), (receive, choices) = torch.stack([send_W2.T, receive_W2.T]).tolist()
        return send, receive, sum(choices)

    def _table(self, placement: Placement, device: torch.device) -> tuple[Tensor, Tensor]:
        """(E,) int32 each: the rank of an expert, and its slot there."""
        key = (placement, device)
        if key not in self._tables:
            ids = [placement.rank_of_expert(), placement.slot_of_expert()]
            rank_E, slot_E = torch.tensor(ids, dtype=torch.int32, device=device)
            self._tables[key] = (rank_E, slot_E)
        return self._tables[key]
