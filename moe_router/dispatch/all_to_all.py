"""Uneven all-to-all with host splits, over NCCL or gloo: portable, one row per (token, rank).

Not covered: CUDA graphs (the splits are read by the host).
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moe_router.dispatch.base import Arrived, Dispatcher, Group, Received
from moe_router.dispatch.exchange import Collective, Mover, Return, Send, Splits
from moe_router.dispatch.travel import Travel
from moe_router.dispatch.where import Rows, Tables, Where, lay_out, pad, plan_within
from moe_router.placement import Placement
from moe_router.types import Choice, Plan
from moe_router_kernels import reference
from moe_router_kernels.reference_ranks import goes_to


@dataclass(frozen=True, slots=True)
class _WayBack:
    rows: Rows
    splits: Splits
    mover: Mover
    tokens: int


class AllToAll(Dispatcher):
    """Args:
    group: the ranks; None is the default process group.
    """

    def __init__(self, group: Group = None) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.ranks = dist.get_world_size(group)
        self._tables = Tables(self.rank)
        self._mover: Mover = Collective(group)

    def dispatch(
        self,
        x_TD: Tensor,
        choice: Choice,
        plan: Plan,
        placement: Placement,
        first_token: int = 0,
    ) -> Received:
        T = x_TD.size(0)
        some = max(T, 1)  # of an empty batch, one token that goes nowhere stands in the slots
        x_TD, weight_TK = pad(x_TD, some), pad(choice.weight_TK, some)
        found = self._tables.find(choice, plan, placement, first_token)
        where = Where(*(pad(ids, some, -1) for ids in found))
        splits = self._splits(where.rank_TK, placement)
        rows = lay_out(where, weight_TK.detach(), splits.send_W, sum(splits.send))

        started: list[Travel] = []
        way = (rows, splits, self._mover)
        sent = Send.apply(  # type: ignore[no-untyped-call]
            x_TD, weight_TK, *way, torch.is_grad_enabled(), started
        )
        (travel,), told = started, rows.overflow

        def planned(id_NK: Tensor) -> Plan:
            held = len(placement.experts_of_rank[self.rank])
            local, too_few = plan_within(id_NK, held, splits.experts)
            if too_few is not None:
                told.bitwise_or_(too_few)
            return local

        early = None if travel.with_ids else planned(sent[2])

        def arrive() -> Arrived:
            x_ND, weight_NK, id_NK = travel.arrive(*sent)
            return Arrived(x_ND, Choice(id_NK, weight_NK), early or planned(id_NK))

        return Received(sent[0], arrive, _WayBack(*way, T), told)

    def combine(self, y_ND: Tensor, received: Received) -> Tensor:
        way: _WayBack = received.handle
        out_TD: Tensor = Return.apply(  # type: ignore[no-untyped-call]
            y_ND, way.rows, way.splits, way.mover
        )
        return out_TD[: way.tokens]

    def total(self, x: Tensor) -> Tensor:
        summed = x.clone()
        dist.all_reduce(summed, group=self.group)
        return summed

    def _splits(self, rank_TK: Tensor, placement: Placement) -> Splits:
        """Rows, and how many choices they bring: counted by the sender, read by the host."""
        send_W = goes_to(rank_TK, self.ranks).sum(0)
        send_W2 = torch.stack([send_W, reference.count(rank_TK, self.ranks)], 1)
        receive_W2 = torch.empty_like(send_W2)
        dist.all_to_all_single(receive_W2, send_W2, group=self.group)
        (send, _), (receive, choices) = torch.stack([send_W2.T, receive_W2.T]).tolist()
        return Splits(send, receive, send_W, sum(choices))
