"""Token pruning: after a block, the least important tokens of each sequence leave for good.

What stays is a smaller batch, so every later block is cheaper. Each survivor carries a mass by
which the classifier pools: that is how the router learns which tokens matter. Importance may look
at the whole sequence, so pruning is not causal.

By threshold, tokens leave whose importance is too low, however many they are. The mass is then a
soft threshold. While nobody leaves yet (`soft_steps`) attention and pooling see a token by its
mass; afterwards survivors count as one each, and only their gradient is that of the soft mass. By
rank, `soft_steps` has the router learn by saliency: see `routing/saliency.py`.

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
    count_best,
    flops_of,
    keep_all,
    keep_best,
    keep_where,
)
from moe_router.routing.saliency import LEAST, counted
from moe_router.types import Choice, Tokens
from moe_router_kernels import reference, select_top_c


def shifted_share(share: float, shift: float) -> float:
    """A share whose logit is shifted; above 0."""
    if shift == 0 or share == 1:
        return share
    odds = share / (1 - share) * math.exp(shift)
    return max(odds / (1 + odds), 1e-6)


TRUST = 3.0  # in a trial, of the router's logits beside chance


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
        if config.decide == "threshold":
            weight_T, kept = self._above(value_T, rank_T, tokens, lengths, context)
        elif config.soft_steps:
            weight_T, kept = self._salient(order_T, rank_T, tokens, lengths, context)
        else:
            weight_T, kept = value_T, self._best(rank_T, tokens, lengths, context)
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

    @property
    def _least(self) -> int:
        """Tokens of a sequence that stay, if it has so many."""
        return max(self.config.protect, self.config.min_keep)

    def _keep(self, context: Context) -> float:
        keep = self.config.eased(self.config.keep, context.step if self.training else None)
        return shifted_share(keep, self.lean)

    def _best(
        self, rank_T: Tensor, tokens: Tokens, lengths: Sequence[int], context: Context
    ) -> Kept:
        return keep_best(rank_T, tokens.offsets_B1, lengths, self._keep(context), self._least)

    def _salient(
        self,
        order_T: Tensor,
        rank_T: Tensor,
        tokens: Tokens,
        lengths: Sequence[int],
        context: Context,
    ) -> tuple[Tensor, Kept]:
        """The best by rank, whose router learns what each token is worth."""
        config, bounds_B1 = self.config, tokens.offsets_B1
        soft = self.stays_soft(context.step)
        here_T = torch.ones_like(rank_T, dtype=torch.bool)
        if soft:
            if tokens.size_T is not None:  # whoever left before is computed, not asked
                here_T = tokens.size_T > 0.5
            kept = keep_all(lengths, bounds_B1)
            present_B = reference.count(
                torch.where(here_T, kept.target_T1[:, 0], -1)[:, None].int(), len(lengths)
            )
            count_B = count_best(present_B.long(), self._keep(context), self._least)
            rank_T = rank_T.masked_fill(~here_T, -torch.inf)
            taken_T = select_top_c(rank_T[:, None], bounds_B1, count_B)[:, 0]
        else:
            kept = self._best(rank_T, tokens, lengths, context)
            taken_T = kept.target_T1[:, 0] >= 0
            if not self.training:
                return torch.ones_like(order_T), kept
        asked_T = here_T & (tokens.position_T >= config.protect)
        return counted(order_T, taken_T, asked_T, bounds_B1, config.temperature), kept

    def _above(
        self,
        value_T: Tensor,
        rank_T: Tensor,
        tokens: Tokens,
        lengths: Sequence[int],
        context: Context,
    ) -> tuple[Tensor, Kept]:
        """Those above the threshold, and the ones that always stay."""
        config, bounds_B1 = self.config, tokens.offsets_B1
        count_B = bounds_B1.diff().clamp(max=self._least)
        safe_T = select_top_c(rank_T[:, None], bounds_B1, count_B)[:, 0]
        margin_T = (value_T - config.cut) / config.temperature + self.lean
        weight_T = margin_T.sigmoid().masked_fill(safe_T, 1.0)
        mass_T = weight_T if tokens.size_T is None else weight_T * tokens.size_T
        if self.stays_soft(context.step):
            kept = keep_all(lengths, bounds_B1)
        else:
            kept = keep_where((margin_T > 0) | safe_T, tokens, context.bounds)
            weight_T = weight_T + (1 - weight_T).detach()
        return weight_T, replace(kept, expected=mass_T.sum())

    def mass(self, tokens: Tokens, choice: Choice, kept: Kept) -> Tensor | None:
        """(R,) fp32: mass of the survivors, times their weight; None where all count as one."""
        if self.config.weighs and not (self.training or self.soft):
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
