"""Grouped-query attention over packed sequences, with rotary positions."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_router.config import ModelConfig
from moe_router.models.kv_cache import LayerCache
from moe_router.models.layout import Layout
from moe_router.types import Tokens


def rotate(x_THd: Tensor, position_T: Tensor, theta: float) -> Tensor:
    """Rotary position embedding, in fp32. Source: Su et al. 2021, arXiv:2104.09864."""
    half = x_THd.size(-1) // 2
    frequency = theta ** (-torch.arange(half, device=x_THd.device, dtype=torch.float32) / half)
    angle_T1d = (position_T[:, None].float() * frequency)[:, None]
    first, second = x_THd.float().chunk(2, -1)
    cos, sin = angle_T1d.cos(), angle_T1d.sin()
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    return turned.to(x_THd.dtype)


def attend(q_THd: Tensor, k_THd: Tensor, v_THd: Tensor, layout: Layout) -> Tensor:
    """Causal attention inside each sequence; no token sees another sequence.

    Args:
        q_THd: (T, heads, d).
        k_THd, v_THd: (T, kv_heads, d).
    """
    qkv = (q_THd, k_THd, v_THd)
    if layout.uniform:
        shape = (len(layout.lengths), layout.lengths[0])
        return _sdpa(*(x.view(*shape, *x.shape[1:]) for x in qkv)).flatten(0, 1)
    # sequences are padded at their end, where causality alone hides the padding
    outs = [_sdpa(*(x[token_BS] for x in qkv)).flatten(0, 1) for token_BS in layout.buckets]
    return torch.cat(outs)[layout.place_T] if outs else q_THd


def attend_cached(q_THd: Tensor, cache: LayerCache, layout: Layout) -> Tensor:
    """Attention of the newest tokens of each sequence to all that its cache holds."""
    key_BSHd, value_BSHd, length_B = cache.all()
    count_B = torch.tensor(layout.lengths, device=q_THd.device)
    outs = []
    for token_BS in layout.buckets:
        sequence_B = torch.searchsorted(count_B.cumsum(0), token_BS[:, 0], right=True)
        past_B = length_B[sequence_B] - count_B[sequence_B]
        last_BS = past_B[:, None] + torch.arange(token_BS.size(1), device=q_THd.device)
        place_K = torch.arange(key_BSHd.size(1), device=q_THd.device)
        seen_BSK = place_K <= last_BS[..., None]
        key, value = key_BSHd[sequence_B], value_BSHd[sequence_B]
        outs.append(_sdpa(q_THd[token_BS], key, value, seen_BSK[:, None]).flatten(0, 1))
    return torch.cat(outs)[layout.place_T] if outs else q_THd


def _sdpa(q_BSHd: Tensor, k_BSHd: Tensor, v_BSHd: Tensor, mask: Tensor | None = None) -> Tensor:
    """(B, S, H, d); causal without a mask."""
    q, k, v = (x.transpose(1, 2) for x in (q_BSHd, k_BSHd, v_BSHd))
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
    )
    return out.transpose(1, 2)


class Attention(nn.Module):
    """Args:
    config: dim, heads, kv_heads, rope_theta.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.dim // config.heads
        self.theta = config.rope_theta
        narrow = self.head_dim * config.kv_heads
        self.q = nn.Linear(config.dim, config.dim, bias=False)
        self.k = nn.Linear(config.dim, narrow, bias=False)
        self.v = nn.Linear(config.dim, narrow, bias=False)
        self.o = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, tokens: Tokens, layout: Layout, cache: LayerCache | None = None) -> Tensor:
        """(T, D) of normalised tokens to (T, D), without the residual."""
        x_TD, position_T = tokens.x_TD, tokens.position_T
        heads = (len(x_TD), -1, self.head_dim)
        q, k, v = (project(x_TD).view(heads) for project in (self.q, self.k, self.v))
        q, k = rotate(q, position_T, self.theta), rotate(k, position_T, self.theta)
        if cache is None:
            out = attend(q, k, v, layout)
        else:
            cache.append(k, v, layout.lengths)
            out = attend_cached(q, cache, layout)
        mixed: Tensor = self.o(out.flatten(1))
        return mixed
