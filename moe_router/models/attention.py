"""Grouped-query attention over packed sequences, with RoPE and an optional cache."""

from typing import NamedTuple

from torch import Tensor, nn

from moe_router.config import Kernels, ModelConfig
from moe_router.layers.swiglu import linear_of_kept
from moe_router.models.attend import attend_packed, received
from moe_router.models.attend_routed import Chosen, Executed, RoutedAttention
from moe_router.models.attend_routed_cached import CachedRoutedAttention
from moe_router.models.cached import CachedLayer
from moe_router.models.kv_cache import LayerCache
from moe_router.models.packing import Packing
from moe_router.models.rope import Turn, rotate


class Attended(NamedTuple):
    """Attributes:
    out_TD: what attention adds.
    key_TJC: the keys of J heads, as queries see them.
    received_T: how much attention came to each token, if asked for.
    executed: of routed attention, what was computed.
    """

    out_TD: Tensor
    key_TJC: Tensor
    received_T: Tensor | None = None
    executed: Executed | None = None


class Attention(nn.Module):
    """Source: Ainslie et al. 2023, arXiv:2305.13245.

    Args:
        config: dim, heads, kv_heads, head_dim, and how attention is routed.
        layer: index of the block; decides whether it is.
        kernels: see `Router`.
    """

    def __init__(self, config: ModelConfig, layer: int = 0, kernels: Kernels = "auto") -> None:
        super().__init__()
        self.channels = config.channels
        width, kv_dim = (self.channels * n for n in (config.heads, config.kv_heads))
        self.q = nn.Linear(config.dim, width, bias=False)
        self.k = nn.Linear(config.dim, kv_dim, bias=False)
        self.v = nn.Linear(config.dim, kv_dim, bias=False)
        self.o = nn.Linear(width, config.dim, bias=False)
        how = config.attends(layer)
        self.routed = None if how is None else RoutedAttention(how, layer, kernels)

    def forward(
        self,
        x_TD: Tensor,
        turn: Turn,
        packing: Packing,
        cache: CachedLayer | None = None,
        size_T: Tensor | None = None,
        *,
        count_received: bool = False,
        step: int | None = None,
    ) -> Attended:
        """(T, D) to (T, D). With a cache, the tokens are appended to it and attend to all of it;
        without one a token of size s is seen as s equal ones. `step`: see `Context`."""
        q_THC, k_TJC, v_TJC = (
            linear_of_kept(project, x_TD, packing.kept_T).view(
                x_TD.size(0), project.out_features // self.channels, self.channels
            )
            for project in (self.q, self.k, self.v)
        )
        executed = None
        if self.routed is not None:
            chosen, k_TJC = self._route(
                self.routed, q_THC, k_TJC, v_TJC, turn, packing, cache, step
            )
            y_THC, executed = chosen.y_THC, chosen.executed
        elif cache is None:
            q_THC, k_TJC = (rotate(x, turn).to(v_TJC.dtype) for x in (q_THC, k_TJC))
            y_THC = attend_packed(q_THC, k_TJC, v_TJC, packing, size_T)
        else:
            y_THC, k_TJC = cache.attend(q_THC, k_TJC, v_TJC, turn, packing)
        received_T = received(q_THC, k_TJC, packing, size_T) if count_received else None
        out_TD = linear_of_kept(self.o, y_THC.flatten(1), packing.kept_T)
        return Attended(out_TD, k_TJC, received_T, executed)

    def _route(
        self,
        routed: RoutedAttention,
        q_THC: Tensor,
        k_TJC: Tensor,
        v_TJC: Tensor,
        turn: Turn,
        packing: Packing,
        cache: CachedLayer | None,
        step: int | None,
    ) -> tuple[Chosen, Tensor]:
        """What attention gives, and the turned keys."""
        if cache is not None:
            assert isinstance(cache, LayerCache)  # others refuse a model whose attention is routed
            return CachedRoutedAttention(routed, cache)(q_THC, k_TJC, v_TJC, turn, packing)
        q_THC, k_TJC = (rotate(x, turn).to(v_TJC.dtype) for x in (q_THC, k_TJC))
        return routed(q_THC, k_TJC, v_TJC, packing, step if self.training else None), k_TJC
