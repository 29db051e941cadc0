"""What the blocks of a pass leave behind, and which tokens each of them computed."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from moe_router.config import RoutingConfig
from moe_router.layers.merge import Merged
from moe_router.models.account import Account
from moe_router.models.block import BlockOutput
from moe_router.models.budget import ExpectedCost
from moe_router.models.stream import Stream
from moe_router.routing import Context
from moe_router.routing.depth import Kept, chain
from moe_router.types import Choice, HaltState, Plan, Routed


@dataclass(slots=True)
class Passed:
    """What came out of the blocks.

    Attributes:
        stream: the tokens that took the last block.
        account, cost: count what is executed, and what is expected to be; None: nobody asks.
        plan: their rows by token; None where no token ever leaves, or nobody observes.
        slot_T: int64, the row of the token that each one merged into; None without merging.
        tokens: that came in.
        first_TD, before_TD: the states before the first block, and before the last one that ran.
        routed: what each block's experts did; None for a dense block.
        depth: the losses of each router in depth or in attention, unscaled; this rank's share.
        halted: how each token halted, and its output; None without halting.
    """

    stream: Stream
    account: Account | None = None
    cost: ExpectedCost | None = None
    routed: list[Routed | None] = field(default_factory=list)
    depth: list[dict[str, Tensor]] = field(default_factory=list)
    halted: HaltState | None = None
    plan: Plan | None = None
    slot_T: Tensor | None = None
    tokens: int = field(init=False)
    first_TD: Tensor = field(init=False)
    before_TD: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.tokens = self.stream.packing.tokens
        self.first_TD = self.before_TD = self.stream.x_TD

    def asked(self, routing: RoutingConfig | None) -> Tensor | None:
        """By which states the next block decides who takes it; None: those that come to it."""
        if routing is None or routing.decide_at == "same":
            return None
        return self.first_TD if routing.decide_at == "early" else self.before_TD

    def advance(self, out: BlockOutput) -> None:
        """A block has run."""
        self.before_TD = self.stream.x_TD
        self.stream = replace(self.stream, x_TD=out.x_TD)
        self.routed.append(out.routed)
        if out.choice is not None:
            self.depth.append(out.choice.losses)
        if out.losses:
            self.depth.append(out.losses)

    def merge(self, slots: Stream, merged: Merged) -> None:
        """Tokens merged inside a block."""
        self.stream = slots
        self._follow(merged.kept)
        slot_T = merged.slot_T
        self.slot_T = slot_T if self.slot_T is None else slot_T[self.slot_T]

    def go_on(self, kept: Kept) -> None:
        """Only the kept tokens take the next block."""
        self.stream = self.stream.take(kept)
        self._follow(kept)

    def _follow(self, kept: Kept) -> None:
        if self.plan is not None:
            self.plan = chain(self.plan, kept.plan)


def tell(layer: int, passed: Passed, out: BlockOutput, context: Context) -> None:
    """Have it observed which tokens a dense block computed: group 0, or none."""
    if context.observe is None:
        return
    if out.choice is not None and out.kept is not None:
        weight_T1, plan = out.choice.weight_TK, out.kept.plan
    elif passed.plan is not None:
        plan = passed.plan
        weight_T1 = (plan.row_TK >= 0).float()
    else:
        return
    target_T1 = torch.where(plan.row_TK < 0, -1, 0).int()
    one_group = replace(plan, offsets_G1=plan.offsets_G1[[0, -1]])
    context.observe(layer, Choice(target_T1, weight_T1), one_group)
