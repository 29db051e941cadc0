"""One pre-norm transformer block: attention, then a dense or a routed feed-forward layer."""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe_router.config import ModelConfig
from moe_router.dispatch import Dispatcher
from moe_router.layers.moe import MoE
from moe_router.layers.swiglu import SwiGLU
from moe_router.models.attention import Attention
from moe_router.models.kv_cache import LayerCache
from moe_router.models.layout import Layout
from moe_router.placement import Placement
from moe_router.routing import Context, PlanMemory
from moe_router.types import Routed, Tokens


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in fp32. Source: Zhang & Sennrich 2019, arXiv:1910.07467."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


class Block(nn.Module):
    """Args:
    config: of the model.
    layer: index; decides whether the block is routed.
    dispatcher, placement: of a routed block.
    """

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        dispatcher: Dispatcher | None = None,
        placement: Placement | None = None,
    ) -> None:
        super().__init__()
        dim = config.dim
        self.attention_norm = RMSNorm(dim, config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(dim, config.norm_eps)
        self.moe: MoE | None = None
        self.mlp: SwiGLU | None = None
        if config.moe is not None and config.is_moe(layer):
            self.moe = MoE(dim, config.moe, layer=layer, dispatcher=dispatcher, placement=placement)
        else:
            self.mlp = SwiGLU(dim, config.hidden)

    def forward(
        self,
        tokens: Tokens,
        layout: Layout,
        context: Context,
        cache: LayerCache | None = None,
    ) -> tuple[Tensor, Routed | None]:
        """Residuals added; what the router did beside it."""
        normed = dataclasses.replace(tokens, x_TD=self.attention_norm(tokens.x_TD))
        x_TD = tokens.x_TD + self.attention(normed, layout, cache)
        normed = dataclasses.replace(tokens, x_TD=self.mlp_norm(x_TD))
        if self.mlp is not None:
            return x_TD + self.mlp(normed.x_TD), None
        assert self.moe is not None
        routed = self.moe(normed, context)
        return x_TD + routed.delta_TD, routed

    def recomputed(
        self, tokens: Tokens, layout: Layout, context: Context
    ) -> tuple[Tensor, Routed | None]:
        """`forward`, whose activations are computed again in backward, by the plan of the first."""
        context = dataclasses.replace(context, memory=PlanMemory())
        out: tuple[Tensor, Routed | None] = checkpoint(
            self.forward, tokens, layout, context, use_reentrant=False, preserve_rng_state=False
        )
        return out
