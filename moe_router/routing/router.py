"""The router: score, decide, weigh."""

from collections.abc import Callable
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from moe_router.config import Kernels, RouterConfig
from moe_router.errors import ConfigError
from moe_router.routing.context import PLAIN, Context
from moe_router.routing.decide import capacity, weigh
from moe_router.routing.losses import router_losses, wants_sums
from moe_router.routing.score import make_score
from moe_router.types import Choice, NoiseKey, Plan, Tokens, Total, same
from moe_router_kernels import Gate, gate, reference, select_top_c
from moe_router_kernels.choose import runs_triton


class _Decided(NamedTuple):
    """What a recomputed pass must decide again: raw choices, ids >= E being null experts and -1
    none; how often each group was chosen, and the Plan, where the gate made them."""

    raw_TK: Tensor
    load_G: Tensor | None
    plan: Plan | None


class Router(nn.Module):
    """Decides, for each token, which groups process it. All arithmetic is fp32.

    Args:
        dim: hidden size D of the tokens.
        config: policy, score, losses; see `RouterConfig`.
        layer: index of the layer, part of the noise's name.
        kernels: `auto` decides by the fused kernel on a GPU, `triton` wherever it runs.
    """

    bias_E: Tensor

    def __init__(
        self, dim: int, config: RouterConfig, *, layer: int = 0, kernels: Kernels = "auto"
    ) -> None:
        super().__init__()
        self.config = config
        self.layer = layer
        self.kernels = kernels
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
        context = context or PLAIN
        config = self.config
        with torch.autocast(tokens.x_TD.device.type, enabled=False):
            x_TD = self._jitter(tokens.x_TD, context.key)
            logits_TG = self.score(x_TD, tokens.position_T)
            made = self._gate(logits_TG, context.held("decided"))
            plan = None if made.plan is None else Plan(*made.plan)
            decided = context.recall("decided", lambda: _Decided(made.raw_TK, made.load_G, plan))
            target_TK = made.raw_TK
            if config.null_experts:
                target_TK = target_TK.masked_fill(target_TK >= config.experts, -1)
            weight_TK = weigh(made.weight_TK, target_TK, config)
            losses = router_losses(logits_TG, made, decided.load_G, tokens, config, context, total)
        real = None
        if config.null_experts:  # shares of a token sum to 1
            real = made.share_G[: config.experts].sum() / max(len(x_TD), 1)
        return Choice(target_TK, weight_TK, losses, decided.plan, real)

    def _gate(self, logits_TG: Tensor, decided: _Decided | None) -> Gate:
        """Decide and weigh, or weigh what was decided before."""
        config = self.config
        if self.kernels == "triton" and not runs_triton(logits_TG.device):
            raise ConfigError(
                f"kernels=triton on {logits_TG.device}: want a GPU and Triton, or "
                "TRITON_INTERPRET=1; set kernels=auto"
            )
        given_TK = None if decided is None else decided.raw_TK
        if given_TK is None and config.policy == "expert_choice":
            given_TK = self._chosen_by_experts(logits_TG.detach())
        return gate(
            logits_TG,
            config.top_k,
            experts=config.experts,
            score=config.score,
            renormalise=config.renormalise,
            bias_E=self.bias_E if config.bias_rate > 0 else None,
            expert_groups=config.expert_groups,
            top_groups=config.top_groups,
            given_TK=given_TK,
            sums=wants_sums(config),
            kernels=self.kernels,
        )

    def _chosen_by_experts(self, logits_TE: Tensor) -> Tensor:
        """(T, E) int32: each expert takes its best tokens; K = E, -1 is not chosen."""
        T, E = logits_TE.shape
        bounds = torch.arange(2, dtype=torch.int32, device=logits_TE.device) * T
        rows = bounds.new_full((1,), capacity(T, self.config))
        score_TE = reference.score(logits_TE, self.config.score)
        taken_TE = select_top_c(score_TE, bounds, rows, self.kernels)
        return torch.where(taken_TE, torch.arange(E, device=rows.device), -1).int()

    def _jitter(self, x_TD: Tensor, key: NoiseKey) -> Tensor:
        """Multiply by U(1 - j, 1 + j) in training. Source: Fedus et al. 2021, arXiv:2101.03961."""
        j = self.config.jitter
        if not (j and self.training):
            return x_TD
        noise_TD = reference.uniform_noise(
            key.seed, key.step, self.layer, key.first_token, x_TD.size(0), x_TD.size(1), x_TD.device
        )
        return reference.wide(x_TD) * (1 + j * (2 * noise_TD - 1))

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
