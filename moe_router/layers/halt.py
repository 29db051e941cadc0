"""Adaptive computation time in depth: a token that has come far enough takes no further block.

After a block, each token that goes on gets a halting probability; when their sum reaches the
threshold it halts, and what was left to 1 is the weight of its last state. Its output is the mean
of its states by those weights. A token decides for itself, so halting is causal.

Source: Graves 2016, arXiv:1603.08983, equations 6 to 13, with blocks for steps. A halted token is
not computed, and leaves nothing in the caches of the blocks that it does not take.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from moe_router.config import RoutingConfig
from moe_router.routing import Context
from moe_router.routing.depth import (
    DepthRouter,
    Kept,
    Shifted,
    chain,
    every_token,
    flops_of,
    keep_where,
)
from moe_router.types import HaltState, Plan, Tokens
from moe_router_kernels import combine


def begin(x_TD: Tensor, lengths: Sequence[int]) -> HaltState:
    """Every token goes on.

    Args:
        lengths: of the sequences in x_TD, on the host.
    """
    zero_T = torch.zeros(x_TD.size(0), device=x_TD.device)
    plan = every_token(lengths, x_TD.device)
    return HaltState(plan, zero_T, zero_T, zero_T.int(), torch.zeros_like(x_TD))


class Halt(Shifted):
    """Args:
    dim: hidden size D.
    config: threshold, start, router.
    """

    def __init__(self, dim: int, config: RoutingConfig) -> None:
        super().__init__()
        self.config = config
        self.router = DepthRouter(dim, config)

    def forward(self, rows: Tokens, state: HaltState, context: Context) -> tuple[HaltState, Kept]:
        """Take one step after a block. Waits for the device: how many go on is a value.

        Args:
            rows: the R tokens that went on until here.
            state: of all T tokens.

        Returns:
            The next state, and which of the rows go on.
        """
        logit_R = self.router(rows.x_TD, rows.position_T) + (self.config.start - self.lean)
        if context.ledger is not None:
            context.ledger.add("router", flops_of(self, logit_R.numel()), 0)
        p_T = _weigh(logit_R.sigmoid()[:, None], state.plan)[:, 0]
        reached_T = state.cumulative_T + p_T >= self.config.cut
        expected = (1 - state.cumulative_T - p_T).clamp(min=0).sum()
        state = _step(state, rows.x_TD, p_T, reached_T)
        kept = keep_where(~reached_T[state.plan.src_R], rows.offsets_B1)
        kept = replace(kept, expected=expected)
        return replace(state, plan=chain(state.plan, kept.plan)), kept


def finish(x_RD: Tensor, state: HaltState) -> HaltState:
    """After the last block: whoever still goes on halts."""
    never_T = torch.zeros_like(state.cumulative_T)
    return _step(state, x_RD, never_T, torch.ones_like(never_T, dtype=torch.bool))


def ponder_loss(state: HaltState, tokens: Tensor) -> Tensor:
    """Steps plus remainder, mean over the tokens of all ranks: this rank's share.

    Args:
        tokens: over all ranks.

    Source: Graves 2016, equation 13. The gradient is that of the remainder.
    """
    return (state.steps_T + state.remainder_T).sum() / tokens.clamp(min=1)


def _step(state: HaltState, x_RD: Tensor, p_T: Tensor, halts_T: Tensor) -> HaltState:
    """Count the states x_RD of the tokens that went on: by p, or by all that is left."""
    went_T = state.plan.row_TK[:, 0] >= 0
    halts_T = halts_T & went_T
    left_T = 1 - state.cumulative_T
    weight_T = torch.where(halts_T, left_T, p_T)
    return HaltState(
        plan=state.plan,
        cumulative_T=state.cumulative_T + weight_T,
        remainder_T=torch.where(halts_T, left_T, state.remainder_T),
        steps_T=state.steps_T + went_T,
        output_TD=state.output_TD + _weigh(x_RD, state.plan, weight_T[:, None]),
    )


def _weigh(x_RD: Tensor, plan: Plan, weight_T1: Tensor | None = None) -> Tensor:
    """(T, D): rows back to their tokens, times a weight; 0 where a token has no row."""
    if weight_T1 is None:
        weight_T1 = torch.ones(plan.row_TK.shape, device=x_RD.device)
    return combine(x_RD, weight_T1, plan.src_R, plan.choice_R, plan.row_TK)
