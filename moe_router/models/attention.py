"""Grouped-query attention over packed sequences, with RoPE and an optional cache."""

from typing import NamedTuple

from torch import Tensor, nn

from moe_router.config import Kernels, ModelConfig
from moe_router.layers.linear import linear_of_kept, linears_of_kept
from moe_router.models.attend import attend_packed, received
from moe_router.models.attend_clustered import ClusteredAttention
from moe_router.models.attend_clustered_cached import CachedClusteredAttention
from moe_router.models.attend_routed import Chosen, Executed, RoutedAttention
from moe_router.models.attend_routed_cached import CachedRoutedAttention
from moe_router.models.cached import CachedLayer
from moe_router.models.kv_cache import LayerCache
from moe_router.models.packing import Packing
from moe_router.models.rope import Turn, rotate
from moe_router.routing.context import PLAIN, Context
from moe_router.types import Total, same


class Attended(NamedTuple):
    """Attributes:
    out_TD: what attention adds.
    key_TJC: the keys of J heads, as queries see them.
    received_T: how much attention came to each token, if asked for.
    executed: of routed attention, what was computed.
    losses: of its choice; None: it has none.
    """

    out_TD: Tensor
    key_TJC: Tensor
    received_T: Tensor | None = None
    executed: Executed | None = None
    losses: dict[str, Tensor] | None = None


class Attention(nn.Module):
    """Source: Ainslie et al. 2023, arXiv:2305.13245.

    Args:
        config: dim, heads, kv_heads, head_dim, and how attention is routed.
        layer: index of the block; decides whether it is.
        kernels: see `Router`.
        total: sums a tensor over all ranks.
    """

    def __init__(
        self,
        config: ModelConfig,
        layer: int = 0,
        kernels: Kernels = "auto",
        *,
        total: Total = same,
    ) -> None:
        super().__init__()
        self.channels = config.channels
        width, kv_dim = (self.channels * n for n in (config.heads, config.kv_heads))
        self.q = nn.Linear(config.dim, width, bias=False)
        self.k = nn.Linear(config.dim, kv_dim, bias=False)
        self.v = nn.Linear(config.dim, kv_dim, bias=False)
        self.o = nn.Linear(width, config.dim, bias=False)
        how = config.attends(layer)
        self.routed: RoutedAttention | ClusteredAttention | None = None
        if how is not None and how.clustered:
            self.routed = ClusteredAttention(config, how, layer, kernels, total=total)
        elif how is not None:
            self.routed = RoutedAttention(how, layer, kernels)

    def forward(
        self,
        x_TD: Tensor,
        turn: Turn,
        packing: Packing,
        cache: CachedLayer | None = None,
        size_T: Tensor | None = None,
        *,
        count_received: bool = False,
        context: Context = PLAIN,
    ) -> Attended:
        """(T, D) to (T, D). With a cache, the tokens are appended to it and attend to all of it;
        without one a token of size s is seen as s equal ones."""
        q_THC, k_TJC, v_TJC = (
            x_TN.view(x_TN.size(0), x_TN.size(1) // self.channels, self.channels)
            for x_TN in linears_of_kept((self.q, self.k, self.v), x_TD, packing.kept_T)
        )
        executed = losses = None
        if self.routed is not None:
            qkv = (q_THC, k_TJC, v_TJC)
            chosen, k_TJC = self._route(self.routed, x_TD, *qkv, turn, packing, cache, context)
            y_THC, executed, losses = chosen.y_THC, chosen.executed, chosen.losses
        elif cache is None:
            q_THC, k_TJC = (rotate(x, turn).to(v_TJC.dtype) for x in (q_THC, k_TJC))
            y_THC = attend_packed(q_THC, k_TJC, v_TJC, packing, size_T)
        else:
            y_THC, k_TJC = cache.attend(q_THC, k_TJC, v_TJC, turn, packing)
        received_T = received(q_THC, k_TJC, packing, size_T) if count_received else None
        out_TD = linear_of_kept(self.o, y_THC.flatten(1), packing.kept_T)
        return Attended(out_TD, k_TJC, received_T, executed, losses)

    def _route(
        self,
        routed: RoutedAttention | ClusteredAttention,
        x_TD: Tensor,
        q_THC: Tensor,
        k_TJC: Tensor,
        v_TJC: Tensor,
        turn: Turn,
        packing: Packing,
        cache: CachedLayer | None,
        context: Context,
    ) -> tuple[Chosen, Tensor]:
        """What attention gives, and the turned keys."""
        if cache is not None:
            assert isinstance(cache, LayerCache)  # others refuse a model whose attention is routed
            if isinstance(routed, ClusteredAttention):
                clustered = CachedClusteredAttention(routed, cache)
                return clustered(x_TD, q_THC, k_TJC, v_TJC, turn, packing)
            return CachedRoutedAttention(routed, cache)(q_THC, k_TJC, v_TJC, turn, packing)
        q_THC, k_TJC = (rotate(x, turn).to(v_TJC.dtype) for x in (q_THC, k_TJC))
        qkv = (q_THC, k_TJC, v_TJC)
        if isinstance(routed, ClusteredAttention):
            return routed(x_TD, *qkv, packing, context), k_TJC
        return routed(*qkv, packing, context.step if self.training else None), k_TJC
