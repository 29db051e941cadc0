"""Leaping: at each routed block every token is computed or leaps over it, and may come back later.

A token decides for itself, by its own state, so leaping is causal, in training as in evaluation.
Whoever leaps is truly not computed, in both; it writes nothing into the cache of that block. The
gate is straight-through: 1 for whoever is computed, with the gradient of its probability. In the
first `soft_steps` of training everybody is computed, and the gate of whoever would leap is 0: its
gradient, what the block adds to the token times that of the loss, is the token's saliency, and the
router learns of both sides of its choice.

Source: Kim et al. 2023, "Leap-of-Thought: Accelerating Transformers via Dynamic Token Routing",
EMNLP 2023, aclanthology.org/2023.emnlp-main.976; here what the budget asks for decides how many
leap, and the loss of the task who.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from moe_router.config import RoutingConfig
from moe_router.routing import Context
from moe_router.routing.depth import DepthRouter, Kept, Shifted, flops_of, keep_all, keep_where
from moe_router.types import Choice, Tokens


class Leap(Shifted):
    """Args:
    dim: hidden size D.
    config: threshold, start, soft_steps, protect and router.
    """

    def __init__(self, dim: int, config: RoutingConfig) -> None:
        super().__init__()
        self.config = config
        self.router = DepthRouter(dim, config)

    def choose(
        self, tokens: Tokens, lengths: Sequence[int], context: Context
    ) -> tuple[Choice, Kept]:
        """Decide which tokens the block computes.

        Args:
            tokens: the residual stream before the block.
            lengths: of its sequences, on the host.

        Returns:
            Choice of one group, the token's sequence, and the rows of the kept tokens.
        """
        recomputing = context.recomputing
        p_T = self._keeps(tokens, context)
        takes_T = p_T > self.config.cut

        def keep() -> Kept:
            if self.stays_soft(context.step):
                return keep_all(lengths, tokens.offsets_B1)
            return keep_where(takes_T, tokens, context.bounds)

        kept = context.recall("kept", keep)
        gate_T = takes_T.to(p_T.dtype) + (p_T - p_T.detach())
        gate_T1 = gate_T[:, None].masked_fill(kept.target_T1 < 0, 0.0)
        if context.ledger is not None and not recomputing:
            context.ledger.add("router", flops_of(self, p_T.numel()), 0)
        # the memory of a recomputed block holds decisions alone, no gradient
        return Choice(kept.target_T1, gate_T1), replace(kept, expected=p_T.sum())

    def decide(self, tokens: Tokens, context: Context) -> tuple[Tensor, Tensor]:
        """In evaluation: (T,) bool, who is computed; (T,) by how much it counts."""
        p_T = self._keeps(tokens, context)
        return p_T > self.config.cut, torch.ones_like(p_T)

    def _keeps(self, tokens: Tokens, context: Context) -> Tensor:
        """(T,) probability that a token is computed; 1 for the protected."""
        logit_T = self.router(tokens.x_TD, tokens.position_T) + self.config.start
        kept_T: Tensor = (self.lean_of(tokens, context) - logit_T).sigmoid()
        return kept_T.masked_fill(tokens.position_T < self.config.protect, 1.0)
