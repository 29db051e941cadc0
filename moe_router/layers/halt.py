"""Halting: a token that has come far enough takes no further block.

After a block, each token that goes on halts by a probability. Three ways to use it, `halting`:

- `act`: probabilities add up until they reach the threshold; the last state counts by what was left
  to 1. The output is the mean of the states by those weights, and steps cost.
- `ponder`: the probability is that of halting now, if it has not halted yet: together a
  distribution over the steps, held near a geometric one. The output is the mean of the states by
  it.
- `tsa`: the same distribution; what later blocks add counts by the probability that the token
  still goes on, and the output is the state. Nothing but the task's loss asks a token to halt.

In the last two nobody has to leave for the numbers to be defined, so the first `soft_steps` of
training compute every token; then whoever has reached the threshold leaves, as in evaluation. A
token decides for itself, so halting is causal.

Sources: Graves 2016, arXiv:1603.08983, equations 6 to 13, with blocks for steps. Banino et al.
2021 (PonderNet, arXiv:2107.05407); the expected loss there is the loss of the expected state here,
so that the head runs once. Token-selective attention: a learned gate of two layers on the residual
updates between blocks. A halted token is not computed, and leaves nothing in the caches of the
blocks that it does not take.
"""

import math
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
    keep_all,
    keep_where,
)
from moe_router.types import HaltState, Plan, Tokens
from moe_router_kernels import combine, gather

LEAST = 1e-20  # of a probability; its logarithm is finite


def begin(x_TD: Tensor, offsets_B1: Tensor) -> HaltState:
    """Every token goes on.

    Args:
        offsets_B1: of the sequences in x_TD.
    """
    zero_T = torch.zeros(x_TD.size(0), device=x_TD.device)
    plan = every_token(x_TD.size(0), offsets_B1)
    return HaltState(plan, zero_T, zero_T, zero_T.int(), zero_T, torch.zeros_like(x_TD))


class Halt(Shifted):
    """Args:
    dim: hidden size D.
    config: halting, threshold, start, soft_steps, prior and router.
    """

    def __init__(self, dim: int, config: RoutingConfig) -> None:
        super().__init__()
        self.config = config
        self.router = DepthRouter(dim, config)

    def forward(
        self, rows: Tokens, lengths: Sequence[int], state: HaltState, context: Context
    ) -> tuple[HaltState, Kept]:
        """Take one step after a block. Waits for the device: how many go on is a value.

        Args:
            rows: the R tokens that went on until here.
            lengths: of their sequences, on the host.
            state: of all T tokens.

        Returns:
            The next state, and which of the rows go on.
        """
        config = self.config
        logit_R = self.router(rows.x_TD, rows.position_T) + config.start
        logit_R = logit_R - self.lean_of(rows, context)
        if context.ledger is not None:
            context.ledger.add("router", flops_of(self, logit_R.numel()), 0)
        p_T = _weigh(logit_R.sigmoid()[:, None], state.plan)[:, 0]
        if config.halting != "act":
            p_T = p_T * (1 - state.cumulative_T)
        soft = self.stays_soft(context.step)
        reached_T = (state.cumulative_T + p_T >= config.cut) & (not soft)
        expected = (1 - state.cumulative_T - p_T).clamp(min=0).sum()
        state = _step(state, rows.x_TD, p_T, reached_T, config)
        if soft:
            kept = keep_all(lengths, rows.offsets_B1)
        else:
            kept = keep_where(~reached_T[state.plan.src_R], rows, context.bounds)
        kept = replace(kept, expected=expected)
        return replace(state, plan=chain(state.plan, kept.plan)), kept


def gated(before_RD: Tensor, after_RD: Tensor, state: HaltState) -> Tensor:
    """What a block added to its rows, by the probability that each of them still goes on."""
    left_T1 = (1 - state.cumulative_T)[:, None]
    left_R1 = gather(left_T1, state.plan.src_R, state.plan.row_TK)
    return before_RD + (left_R1 * (after_RD - before_RD)).to(before_RD.dtype)


def finish(x_RD: Tensor, state: HaltState, config: RoutingConfig) -> HaltState:
    """After the last block: whoever still goes on halts."""
    never_T = torch.zeros_like(state.cumulative_T)
    return _step(state, x_RD, never_T, torch.ones_like(never_T, dtype=torch.bool), config)


def halting_losses(state: HaltState, config: RoutingConfig, tokens: Tensor) -> dict[str, Tensor]:
    """Mean over the tokens of all ranks: this rank's share. `act`: steps plus remainder, whose
    gradient is that of the remainder (equation 13). `ponder`: the divergence. `tsa`: none.

    Args:
        tokens: over all ranks.
    """
    match config.halting:
        case "act":
            each_T = state.steps_T + state.remainder_T
        case "ponder":
            each_T = state.divergence_T
        case "tsa":
            return {}
    return {"ponder": each_T.sum() / tokens.clamp(min=1)}


def _step(
    state: HaltState, x_RD: Tensor, p_T: Tensor, halts_T: Tensor, config: RoutingConfig
) -> HaltState:
    """Count the states x_RD of the tokens that went on: by p, or by all that is left."""
    went_T = state.plan.row_TK[:, 0] >= 0
    halts_T = halts_T & went_T
    left_T = 1 - state.cumulative_T
    weight_T = torch.where(halts_T, left_T, p_T)
    counts_T = halts_T.to(weight_T.dtype) if config.halting == "tsa" else weight_T
    divergence_T = state.divergence_T
    if config.halting == "ponder":
        divergence_T = divergence_T + _surprise(weight_T, halts_T, state.steps_T, config.prior)
    return HaltState(
        plan=state.plan,
        cumulative_T=state.cumulative_T + weight_T,
        remainder_T=torch.where(halts_T, left_T, state.remainder_T),
        steps_T=state.steps_T + went_T,
        divergence_T=divergence_T,
        output_TD=state.output_TD + _weigh(x_RD, state.plan, counts_T[:, None]),
    )


def _surprise(weight_T: Tensor, halts_T: Tensor, before_T: Tensor, prior: float) -> Tensor:
    """w log(w / q) of this step: q is that of a geometric distribution, or, where the token halts,
    of all its steps from here on.

    Args:
        before_T: steps before this one.
    """
    here_T = torch.where(halts_T, 0.0, math.log(prior))
    return weight_T * (weight_T.clamp(min=LEAST).log() - before_T * math.log1p(-prior) - here_T)


def _weigh(x_RD: Tensor, plan: Plan, weight_T1: Tensor | None = None) -> Tensor:
    """(T, D): rows back to their tokens, times a weight; 0 where a token has no row."""
    if weight_T1 is None:
        weight_T1 = torch.ones(plan.row_TK.shape, device=x_RD.device)
    return combine(x_RD, weight_T1, plan.src_R, plan.choice_R, plan.row_TK)
