"""Token pruning: after a block, the least important tokens of each sequence leave for good.

What stays is a smaller batch, so every later block is cheaper. Each survivor carries a mass, the
product of its importances, by which the classifier pools: that is how the router learns which
tokens matter. Importance looks at the whole sequence, so pruning is not causal.

Source: the keep rate of Kim et al. 2022 (LTP, arXiv:2107.00910), with importance learned instead
of read from attention.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from moe_router.config import RoutingConfig
from moe_router.routing import Context
from moe_router.routing.depth import DepthRouter, Kept, flops_of, keep_best
from moe_router.types import Choice, Tokens


class Prune(nn.Module):
    """Args:
    dim: hidden size D.
    config: keep and router.
    """

    def __init__(self, dim: int, config: RoutingConfig) -> None:
        super().__init__()
        self.config = config
        self.router = DepthRouter(dim, config)

    def forward(
        self, tokens: Tokens, lengths: Sequence[int], context: Context
    ) -> tuple[Choice, Kept]:
        """Choose the survivors: the first token of a sequence, and its best others.

        Args:
            tokens: the residual stream after the block.
            lengths: of its sequences, on the host.

        Returns:
            Choice of one group, the token's sequence, by its importance in (0, 1); and the rows
            of the survivors.
        """
        logit_T = self.router(tokens.x_TD, tokens.position_T)
        kept = keep_best(logit_T, tokens.offsets_B1, lengths, self.config.keep, always=1)
        if context.ledger is not None:
            context.ledger.add("router", flops_of(self, logit_T.numel()), 0)
        weight_T1 = logit_T.sigmoid()[:, None].masked_fill(kept.target_T1 < 0, 0.0)
        return Choice(kept.target_T1, weight_T1), kept

    def mass(self, tokens: Tokens, choice: Choice, kept: Kept) -> Tensor:
        """(R,) fp32: mass of the survivors, times their importance."""
        size_T = choice.weight_TK[:, 0]
        if tokens.size_T is not None:
            size_T = size_T * tokens.size_T
        rows: Tensor = size_T[kept.plan.src_R]
        return rows
