"""Token pruning: after a block, the least important tokens of each sequence leave for good.

What stays is a smaller batch, so every later block is cheaper. Each survivor carries a mass by
which the classifier pools: that is how the router learns which tokens matter. Importance may look
at the whole sequence, so pruning is not causal.

By threshold, tokens leave whose importance is too low, however many they are. The mass is then a
soft threshold. While nobody leaves yet (`soft_steps`) attention and pooling see a token by its
mass; afterwards survivors count as one each, and only their gradient is that of the soft mass.

Source: Kim et al. 2021 (LTP, arXiv:2107.00910); its soft mask scales states, which the norm of a
pre-norm block would undo, so here it scales how much others see of a token.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from moe_router.config import RoutingConfig
from moe_router.routing import Context
from moe_router.routing.depth import (
    DepthRouter,
    Kept,
    Shifted,
    flops_of,
    keep_all,
    keep_best,
    keep_where,
)
from moe_router.types import Choice, Tokens
from moe_router_kernels import select_top_c


def shifted_share(share: float, shift: float) -> float:
    """A share whose logit is shifted; above 0."""
    if shift == 0 or share == 1:
        return share
    odds = share / (1 - share) * math.exp(shift)
    return max(odds / (1 + odds), 1e-6)


TRUST = 3.0  # in a trial, of the router's logits beside chance
LEAST = 1e-20  # mass of a token that nobody sees; its logarithm is finite


class Received(nn.Module):
    """Attention received, as importance; what is learned of it is where the threshold lies."""

    def __init__(self, *, frozen: bool) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1), requires_grad=not frozen)

    def forward(self, received_T: Tensor) -> Tensor:
        return received_T + self.bias.to(received_T.dtype)


class Prune(Shifted):
    """Args:
    dim: hidden size D.
    config: decide, keep, threshold, temperature, soft_steps, protect, min_keep and router.

    Attributes:
        tries: tokens leave by chance, as many as ever; see `layers/trial.py`.
        left_B: what the router says of those that left each sequence: the sum of their logits.
            Only their gradient reaches it, and only of passes in which it `tries`.
    """

    tries: bool = False
    left_B: Tensor | None = None

    def __init__(self, dim: int, config: RoutingConfig) -> None:
        super().__init__()
        self.config = config
        self.router: DepthRouter | Received
        if config.router == "attention":
            self.router = Received(frozen=config.frozen)
        else:
            self.router = DepthRouter(dim, config)

    def forward(
        self,
        tokens: Tokens,
        lengths: Sequence[int],
        context: Context,
        received_T: Tensor | None = None,
    ) -> tuple[Choice, Kept]:
        """Choose the survivors: the first tokens of a sequence, and the important ones.

        Args:
            tokens: the residual stream after the block.
            lengths: of its sequences, on the host.
            received_T: how much attention came to each token in the block.

        Returns:
            Choice of one group, the token's sequence, by its weight in (0, 1]; and the rows of the
            survivors.
        """
        config = self.config
        order_T, value_T = self._importance(tokens, received_T)
        by_T = order_T.detach()
        if self.tries:  # Gumbel's noise: a draw without replacement by the router's own odds
            by_T = TRUST * by_T - (-torch.rand_like(by_T).log()).log()
        rank_T = by_T.masked_fill(tokens.position_T < config.protect, torch.inf)
        least = max(config.protect, config.min_keep)
        if config.decide == "top":
            keep = config.eased(config.keep, context.step if self.training else None)
            keep = shifted_share(keep, self.lean)
            kept = keep_best(rank_T, tokens.offsets_B1, lengths, keep, least)
            weight_T = value_T
        else:
            count_B = tokens.offsets_B1.diff().clamp(max=least)
            safe_T = select_top_c(rank_T[:, None], tokens.offsets_B1, count_B)[:, 0]
            margin_T = (value_T - config.cut) / config.temperature + self.lean
            weight_T = margin_T.sigmoid().masked_fill(safe_T, 1.0)
            mass_T = weight_T if tokens.size_T is None else weight_T * tokens.size_T
            if self.stays_soft(context.step):
                kept = keep_all(lengths, tokens.offsets_B1)
            else:
                kept = keep_where((margin_T > 0) | safe_T, tokens.offsets_B1)
                weight_T = weight_T + (1 - weight_T).detach()
            kept = replace(kept, expected=mass_T.sum())
        if context.ledger is not None:
            flops = flops_of(self, value_T.numel())
            if received_T is not None:  # the scores of attention, once more
                flops += 2 * tokens.x_TD.size(1) * sum(n * n for n in lengths)
            context.ledger.add("router", flops, 0)
        gone_T1 = kept.target_T1 < 0
        if self.tries:
            self.left_B = self._said_of(tokens, gone_T1[:, 0])
        weight_T1 = weight_T[:, None].masked_fill(gone_T1, 0.0)
        return Choice(kept.target_T1, weight_T1), kept

    def mass(self, tokens: Tokens, choice: Choice, kept: Kept) -> Tensor | None:
        """(R,) fp32: mass of the survivors, times their weight; None where all count as one."""
        if self.config.decide == "threshold" and not (self.training or self.soft):
            return None
        size_T = choice.weight_TK[:, 0].clamp(min=LEAST)
        if tokens.size_T is not None:
            size_T = (size_T * tokens.size_T).clamp(min=LEAST)
        rows: Tensor = size_T[kept.plan.src_R]
        return rows

    def _said_of(self, tokens: Tokens, gone_T: Tensor) -> Tensor:
        """(B,) the sum of the logits of those that leave, with its gradient, even where the model
        is run without."""
        with torch.enable_grad():
            logit_T: Tensor = self.router(tokens.x_TD.detach(), tokens.position_T)
            gone_T = logit_T.masked_fill(~gone_T, 0.0)
            bounds = tokens.offsets_B1.long()
            left_B: Tensor = torch.segment_reduce(
                gone_T, "sum", offsets=bounds, axis=0, unsafe=True
            )
        return left_B

    def _importance(self, tokens: Tokens, received_T: Tensor | None) -> tuple[Tensor, Tensor]:
        """(T,) the order of the tokens, in which few tie, and their importance: in (0, 1), or
        around 1 if it is attention received."""
        if received_T is not None:
            value_T: Tensor = self.router(received_T)
            return value_T, value_T
        logit_T: Tensor = self.router(tokens.x_TD, tokens.position_T)
        return logit_T, logit_T.sigmoid()
