"""The router: score, decide, weigh. One module for experts now, for depth and attention next."""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from moe_router.config import RouterConfig
from moe_router.routing.context import Context
from moe_router.routing.decide import decide, weigh
from moe_router.routing.losses import router_losses
from moe_router.routing.score import make_score
from moe_router.types import Choice, NoiseKey, Tokens, Total, same
from moe_router_kernels import reference


class Router(nn.Module):
    """Decides, for each token, which groups process it. All arithmetic is fp32.

    Args:
        dim: hidden size D of the tokens.
        config: policy, score, losses; see `RouterConfig`.
        layer: index of the layer, part of the noise's name.
    """

    bias_E: Tensor

    def __init__(self, dim: int, config: RouterConfig, *, layer: int = 0) -> None:
        super().__init__()
        self.config = config
        self.layer = layer
        groups = config.experts + config.null_experts
        self.score = make_score(dim, groups, config.router, config.router_hidden)
        self.score.requires_grad_(not config.frozen)
        balanced = config.bias_rate > 0
        self.register_buffer("bias_E", torch.zeros(config.experts), persistent=balanced)

    def forward(
        self, tokens: Tokens, context: Context | None = None, total: Total = same
    ) -> Choice:
        """Choose groups for every token.

        Args:
            tokens: x_TD of any float dtype.
            context: noise key and memory of the pass.
            total: sums a tensor over all ranks, for losses that count the whole batch.

        Returns:
            Choice over E groups; K = top_k, or E for expert choice.
        """
        context = context or Context()
        config = self.config
        with torch.autocast(tokens.x_TD.device.type, enabled=False):
            x_TD = self._jitter(reference.wide(tokens.x_TD), context.key)
            logits_TG = self.score(x_TD, tokens.position_T)
            score_TG = reference.score(logits_TG, config.score)
            bias_E = self.bias_E if config.bias_rate > 0 else None
            raw_TK = context.recall("target", lambda: decide(score_TG, bias_E, config))
            target_TK = raw_TK.masked_fill(raw_TK >= config.experts, -1)
            weight_TK = weigh(score_TG, target_TK, config)
            losses = router_losses(logits_TG, score_TG, raw_TK, tokens, config, context, total)
        return Choice(target_TK, weight_TK, losses)

    def _jitter(self, x_TD: Tensor, key: NoiseKey) -> Tensor:
        """Multiply by U(1 - j, 1 + j) in training. Source: Fedus et al. 2021, arXiv:2101.03961."""
        j = self.config.jitter
        if not (j and self.training):
            return x_TD
        noise_TD = reference.uniform_noise(
            key.seed, key.step, self.layer, key.first_token, x_TD.size(0), x_TD.size(1), x_TD.device
        )
        return x_TD * (1 + j * (2 * noise_TD - 1))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """`.bfloat16()` leaves the bias in fp32: there, steps of bias_rate would round to none."""
        exact_E = self.bias_E
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.bias_E.dtype != reference.wide(self.bias_E).dtype:
            self.bias_E = exact_E.to(self.bias_E.device)
        return self

    @torch.no_grad()
    def update_bias(self, load_E: Tensor) -> None:
        """One aux-loss-free step: raise the bias of experts below the mean load, lower the others.

        Args:
            load_E: (E,) choices of each expert in the whole step, over all ranks.

        Source: Wang et al. 2024, arXiv:2408.15664, algorithm 1.
        """
        load_E = load_E.float()
        self.bias_E += self.config.bias_rate * torch.sign(load_E.mean() - load_E)
