"""Routed attention and what it must beat, as small models of equal size.

All but `dense` and `linear` see the same share of the causal pairs. `window` sees the last blocks;
`random`, `fixed` and `ours` see their own block and those of a short window, and then random
blocks, the first ones, or those that the router chose. `linear` is causal attention of low rank: a
running sum of as many features as a head has channels. `clusters` chooses tokens, not blocks; how
many it sees is up to its router.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.attention_cases import Shape
from moe_router import Context
from moe_router.config import AttentionConfig, ModelConfig
from moe_router.models import CausalLM, init_parameters
from moe_router.models.attend_clustered import ClusteredAttention
from moe_router.models.attend_routed import Chosen, Executed, RoutedAttention
from moe_router.models.attention import Attention
from moe_router.models.cached import CachedLayer
from moe_router.models.packing import Packing
from moe_router.models.rope import Turn, rotate

NAMES = ("dense", "ours", "window", "random", "fixed", "linear", "ours, modulated", "clusters")
CHUNK = 64  # tokens between which linear attention keeps its sums


def attention_config(name: str, tokens: int, block: int, near: int) -> AttentionConfig | None:
    """How one of NAMES attends, at about 30% of the causal pairs; None: to all.

    Args:
        tokens: of a text.
        near: blocks before its own that everybody sees, where it leaves one to choose.
    """
    top_k = Shape("share30", tokens, block=block).top_k
    window = min(near, max(top_k - 2, 0)) * block
    sizes = {"block": block, "top_k": top_k, "window": window}
    how: dict[str, dict[str, object]] = {
        "ours": {},
        "ours, modulated": {"gated": True},
        "window": {"window": (top_k - 1) * block},
        "random": {"router": "random"},
        "fixed": {"router": "position"},
        # even clusters see 1 / C of the pairs, and the window; nothing random, for a CUDA graph
        "clusters": {"select": "clusters", "router": "linear", "clusters": 4, "noise": 0.0},
    }
    if name not in how:
        return None
    return AttentionConfig(kind="routed", **(sizes | how[name]))  # type: ignore[arg-type]


def make_model(
    name: str, sizes: dict[str, int], tokens: int, block: int, near: int, vocab: int, seed: int
) -> CausalLM:
    """A model whose attention is that of one of NAMES."""
    how = attention_config(name, tokens, block, near)
    config = ModelConfig(**sizes, attention=how)  # type: ignore[arg-type]
    model = CausalLM(config, vocab)
    if name == "linear":
        for block_ in model.blocks:
            block_.attention = LinearAttention(config)
    init_parameters(model, seed=seed)
    return model


class LinearAttention(Attention):
    """Source: Katharopoulos et al. 2020, arXiv:2006.16236, equations 8 to 12; with positions as in
    Su et al. 2021, arXiv:2104.09864, equation 19. Whole texts alone, all of one length."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.routed = RoutedAttention(AttentionConfig(kind="routed"))  # has `_route` asked

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
        assert cache is None and len(set(packing.lengths)) == 1
        with torch.autocast(q_THC.device.type, enabled=False):
            groups = q_THC.size(1) // k_TJC.size(1)
            q, k = (F.elu(x.float()) + 1 for x in (q_THC, k_TJC))
            k, v = (x.float().repeat_interleave(groups, 1) for x in (k, v_TJC))
            y_THC = linear_attention(q, k, v, turn, packing.longest)
        return Chosen(y_THC.to(v_TJC.dtype), Executed(lambda: 0, 0)), k_TJC


def linear_attention(
    q_THC: Tensor, k_THC: Tensor, v_THC: Tensor, turn: Turn, length: int
) -> Tensor:
    """(T, H, C): sum over j <= i of (R_i q_i . R_j k_j) v_j, over sum of q_i . k_j; q, k > 0.

    Args:
        length: tokens of each text.
    """
    turned = (rotate(x, turn) for x in (q_THC, k_THC))
    chunk = min(CHUNK, length)
    assert length % chunk == 0
    # (texts, heads, chunks, tokens, channels)
    q, k, v, turned_q, turned_k = (
        x.view(-1, length // chunk, chunk, *x.shape[1:]).permute(0, 3, 1, 2, 4)
        for x in (q_THC, k_THC, v_THC, *turned)
    )
    sums = (turned_k.mT @ v).cumsum(2)
    weights = k.sum(3, keepdim=True).cumsum(2)
    before, before_weights = (F.pad(x, (0, 0, 0, 0, 1, 0))[:, :, :-1] for x in (sums, weights))
    inside = (turned_q @ turned_k.mT).tril() @ v
    weight = (q @ k.mT).tril().sum(-1, keepdim=True) + (q * before_weights).sum(-1, keepdim=True)
    y = (inside + turned_q @ before) / weight
    return y.permute(0, 2, 3, 1, 4).reshape(q_THC.shape)
