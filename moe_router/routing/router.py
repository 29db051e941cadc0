"""The router: score, decide, weigh. One module for experts now, for depth and attention next."""

from collections.abc import Callable
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from moe_router.config import Kernels, RouterConfig
from moe_router.errors import ConfigError
from moe_router.routing.context import Context
from moe_router.routing.decide import decide, weigh
from moe_router.routing.losses import router_losses
from moe_router.routing.score import make_score
from moe_router.types import Choice, NoiseKey, Plan, Tokens, Total, same
from moe_router_kernels import reference
from moe_router_kernels.choose import gate_and_plan, limits_groups, runs_triton


class _Decided(NamedTuple):
    """Raw choices, ids >= E being null experts, or -1 where the fused kernel decided, which
    then also says how often each group was chosen, and plans."""

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
        context = context or Context()
        config = self.config
        with torch.autocast(tokens.x_TD.device.type, enabled=False):
            x_TD = self._jitter(reference.wide(tokens.x_TD), context.key)
            logits_TG = self.score(x_TD, tokens.position_T)
            score_TG = reference.score(logits_TG, config.score)
            made = context.recall("target", lambda: self._decide(logits_TG, score_TG))
            target_TK = made.raw_TK.masked_fill(made.raw_TK >= config.experts, -1)
            weight_TK = weigh(score_TG, target_TK, config)
            choices = (made.raw_TK, made.load_G)
            losses = router_losses(logits_TG, score_TG, *choices, tokens, config, context, total)
        return Choice(target_TK, weight_TK, losses, made.plan)

    @torch.no_grad()
    def _decide(self, logits_TG: Tensor, score_TG: Tensor) -> "_Decided":
        config = self.config
        bias_E = self.bias_E if config.bias_rate > 0 else None
        if not self._fuses(logits_TG):
            raw_TK = decide(score_TG, bias_E, config)
            return _Decided(raw_TK, None, None)
        out = gate_and_plan(
            logits_TG,
            config.top_k,
            experts=config.experts,
            score=config.score,
            bias_E=bias_E,
            expert_groups=config.expert_groups,
            top_groups=config.top_groups,
        )
        plan = Plan(out["src_R"], out["choice_R"], out["offsets_G1"], out["row_TK"])
        return _Decided(out["target_TK"], out["load_G"].long(), plan)

    def _fuses(self, logits_TG: Tensor) -> bool:
        """Whether the fused kernel decides: it is asked for, runs here, and covers the config."""
        config, runs = self.config, runs_triton(logits_TG.device)
        if self.kernels == "triton" and not runs:
            raise ConfigError(
                f"kernels=triton on {logits_TG.device}: want a GPU and Triton, or "
                "TRITON_INTERPRET=1; set kernels=auto"
            )
        by_sequence = config.null_experts > 0 and config.sequence_balance_loss > 0
        limits = limits_groups(logits_TG.size(1), config.experts, config.expert_groups)
        covered = config.policy == "top_k" and limits and not by_sequence
        return covered and runs and self._wants(logits_TG)

    def _wants(self, logits_TG: Tensor) -> bool:
        exact = logits_TG.dtype == torch.float32  # fp64, which tests use, stays with the reference
        return exact and (
            self.kernels == "triton" or (self.kernels == "auto" and logits_TG.is_cuda)
        )

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
