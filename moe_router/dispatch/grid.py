"""Ranks as a grid: a row of them shares one set of experts, a column holds the same ones.

    rank = row * size + column        tokens travel inside a row, gradients of experts in a column

With one row it is expert parallelism alone, with one column data parallelism alone.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache

import torch.distributed as dist
from torch import Tensor

from moe_router.dispatch.base import Dispatcher, Group, Received
from moe_router.placement import Placement
from moe_router.types import Choice, Plan


@dataclass(frozen=True, slots=True)
class Groups:
    """This rank's row and column, each with all ranks of it in order."""

    row: Group
    column: Group

    @classmethod
    def form(cls, size: int, timeout_s: float) -> "Groups":
        """Of the default group; all its ranks must ask together.

        Args:
            size: ranks of a row, a divisor of all ranks.
            timeout_s: of a collective.
        """
        rank, ranks = dist.get_rank(), dist.get_world_size()
        rows = [list(range(first, first + size)) for first in range(0, ranks, size)]
        columns = [list(range(first, ranks, size)) for first in range(size)]
        mine = []
        for groups in (rows, columns):  # every rank takes part in forming every group
            formed = [dist.new_group(of, timedelta(seconds=timeout_s)) for of in groups]
            mine.append(formed[next(i for i, of in enumerate(groups) if rank in of)])
        return cls(*mine)


class Grid(Dispatcher):
    """Args:
    inner: moves tokens inside the row.
    groups: this rank's.
    """

    def __init__(self, inner: Dispatcher, groups: Groups) -> None:
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.inner, self.groups = inner, groups
        self._row = cache(self._row_of)

    def place(self, experts: int) -> Placement:
        row = self.inner.place(experts).experts_of_rank
        return Placement(row * (self.ranks // self.inner.ranks))

    def dispatch(
        self,
        x_TD: Tensor,
        choice: Choice,
        plan: Plan,
        placement: Placement,
        first_token: int = 0,
    ) -> Received:
        return self.inner.dispatch(x_TD, choice, plan, self._row(placement), first_token)

    def combine(self, y_ND: Tensor, received: Received) -> Tensor:
        return self.inner.combine(y_ND, received)

    def total(self, x: Tensor) -> Tensor:
        summed = x.clone()
        dist.all_reduce(summed)
        return summed

    def exactly(self) -> AbstractContextManager[None]:
        return self.inner.exactly()

    def _row_of(self, placement: Placement) -> Placement:
        first = self.rank - self.inner.rank
        return Placement(placement.experts_of_rank[first : first + self.inner.ranks])
