"""Mixture-of-Depths: a block computes some tokens of each sequence, the others pass by it.

Training keeps the best of a sequence, which looks at later tokens; evaluation asks each token
alone, by what a predictor learned of those choices, so that text can be generated.

Source: Raposo et al. 2024, arXiv:2404.02258. Weights are sigmoids of the router's logits.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor

from moe_router.config import RoutingConfig
from moe_router.routing import Context
from moe_router.routing.depth import DepthRouter, Kept, Shifted, flops_of, keep_best, keep_where
from moe_router.types import Choice, Tokens, Total, same


class Skip(Shifted):
    """Args:
    dim: hidden size D.
    config: keep, predictor and router.
    total: sums a tensor over all ranks, for the predictor's loss.
    """

    def __init__(self, dim: int, config: RoutingConfig, *, total: Total = same) -> None:
        super().__init__()
        self.config = config
        self.total = total
        self.router = DepthRouter(dim, config)
        self.predictor: DepthRouter | None = None
        if config.predictor == "mlp":
            learned = replace(config, router="mlp", frozen=False)
            self.predictor = DepthRouter(dim, learned)

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
        x_TD = tokens.x_TD
        recomputing = context.recomputing
        logit_T, ahead_T = self._logits(tokens)

        def keep() -> Kept:
            if self.training:
                keep = self.config.eased(self.config.keep, context.step)
                return keep_best(logit_T, tokens.offsets_B1, lengths, keep)
            there_T = ahead_T > -self.lean_of(tokens, context)
            return keep_where(there_T, tokens, context.bounds)

        kept = context.recall("kept", keep)
        weight_T1 = logit_T.sigmoid()[:, None].masked_fill(kept.target_T1 < 0, 0.0)
        losses = {}
        if self.training and self.config.predictor_loss:
            count = context.recall("tokens", lambda: self.total(logit_T.new_full((), len(x_TD))))
            losses["predictor"] = _surprise(ahead_T, kept.target_T1) / count.clamp(min=1)
        if context.ledger is not None and not recomputing:
            context.ledger.add("router", flops_of(self, len(x_TD)), 0)
        return Choice(kept.target_T1, weight_T1, losses), kept

    def decide(self, tokens: Tokens, context: Context) -> tuple[Tensor, Tensor]:
        """In evaluation: (T,) bool, who is computed; (T,) by how much it counts."""
        logit_T, ahead_T = self._logits(tokens)
        return ahead_T > -self.lean_of(tokens, context), logit_T.sigmoid()

    def _logits(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """(T,) of the router, and of the predictor."""
        logit_T = self.router(tokens.x_TD, tokens.position_T)
        if self.predictor is None:
            return logit_T, logit_T
        return logit_T, self.predictor(tokens.x_TD.detach(), tokens.position_T)


def _surprise(logit_T: Tensor, target_T1: Tensor) -> Tensor:
    """Nats by which the logits miss who was kept, summed."""
    was_kept_T = (target_T1[:, 0] >= 0).to(logit_T.dtype)
    return F.binary_cross_entropy_with_logits(logit_T, was_kept_T, reduction="sum")
