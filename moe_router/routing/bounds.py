"""Fixed numbers of rows for tokens whose number is a value: then nobody waits for it, and a pass
can be a CUDA graph.

A bound is met or missed on the device. Where it is missed the rows past it are cut off, so nothing
is read or written out of place, and whoever made the pass sees it from the counts and makes it
again without.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_router.types import Plan


class Bounds:
    """Of one pass: one bound for each time that a router lets tokens go, in order.

    Args:
        rows: None: only count.

    Attributes:
        counts: int32, (1,), the rows that each decision wanted; on the device.
    """

    def __init__(self, rows: Sequence[int] | None = None) -> None:
        self._rows = rows
        self.counts: list[Tensor] = []

    @property
    def fixed(self) -> bool:
        """Whether there are any."""
        return self._rows is not None

    def saw(self, plan: Plan) -> None:
        """A decision that took no bound."""
        self.counts.append(plan.offsets_G1[-1:])

    def cut(self, plan: Plan) -> Plan:
        """The plan with as many rows as the next bound says; those that no token has are the last,
        and may hold anything."""
        assert self._rows is not None
        bound = self._rows[len(self.counts)]
        self.saw(plan)
        src_R, choice_R = (x[:bound].clamp(min=0) for x in (plan.src_R, plan.choice_R))
        row_TK = torch.where(plan.row_TK < bound, plan.row_TK, -1)
        return Plan(src_R, choice_R, plan.offsets_G1.clamp(max=bound), row_TK)
