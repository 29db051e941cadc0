"""Attention to chosen key blocks in plain torch, of the chosen pairs alone: what runs where Triton
does not. Specification: `reference_attention.attend_blocks`."""

import math

import torch
from torch import Tensor

from moe_router_kernels.reference import wide


def attend_blocks(
    q_THd: Tensor,
    k_TJd: Tensor,
    v_TJd: Tensor,
    first_N: Tensor,
    last_N: Tensor,
    target_NJK: Tensor,
    block: int,
    gate_NJK: Tensor | None = None,
    *,
    causal: bool = True,
) -> tuple[Tensor, Tensor]:
    """(T, H, d); and (H, T), log2 of the sum of the exponentials of a query's scores.

    A query block's keys, for each KV head, stand in a row: K times `block` of them.

    Args:
        block: the most tokens of one.
    """
    (T, H, d), (N, J, K) = q_THd.shape, target_NJK.shape
    if not (N and J and K):
        return q_THd * 0, wide(q_THd).sum(-1).T * 0
    G, head_J1 = H // J, torch.arange(J, device=target_NJK.device)[:, None]
    token_NQ, live_NQ, token_NJS, seen_NJQS = _pairs(first_N, last_N, target_NJK, block, causal)
    token_NJS = token_NJS.clamp(max=T - 1)
    q_NJXd = q_THd[token_NQ.clamp(max=T - 1)].view(N, block, J, G, d).permute(0, 2, 3, 1, 4)
    k_NJSd, v_NJSd = (wide(x)[token_NJS, head_J1] for x in (k_TJd, v_TJd))
    score = wide(q_NJXd) @ k_NJSd[:, :, None].transpose(3, 4) * d**-0.5  # (N, J, G, Q, S)
    # a finite floor: a query without a key takes nothing, and its gradient is 0, not NaN
    score = score.masked_fill(~seen_NJQS[:, :, None], -1e30)
    weight = score.softmax(-1) * seen_NJQS[:, :, None]
    lse_NQH = score.logsumexp(-1).permute(0, 3, 1, 2).reshape(N * block, H) / math.log(2)
    if gate_NJK is not None:
        weight = weight * gate_NJK.repeat_interleave(block, -1)[:, :, None, None]
    y_NQHd = (weight @ v_NJSd[:, :, None]).permute(0, 3, 1, 2, 4).reshape(N * block, H, d)
    live = live_NQ.flatten()
    return y_NQHd[live].to(q_THd.dtype), lse_NQH[live].T


def _pairs(
    first_N: Tensor, last_N: Tensor, target_NJK: Tensor, block: int, causal: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The queries of each block, which of them exist, the keys of its list, and (N, J, Q, S) bool,
    who sees whom."""
    at, n = torch.arange(block, device=target_NJK.device), target_NJK.clamp(min=0)
    token_NQ = first_N[:, None] + at
    live_NQ = token_NQ < last_N[:, None]
    token_NJS = (first_N[n][..., None] + at).flatten(2)
    there_NJS = token_NJS < last_N[n].repeat_interleave(block, -1)
    there_NJS = there_NJS & (target_NJK >= 0).repeat_interleave(block, -1)
    seen_NJQS = there_NJS[:, :, None] & live_NQ[:, None, :, None]
    if causal:
        seen_NJQS = seen_NJQS & (token_NJS[:, :, None] <= token_NQ[:, None, :, None])
    return token_NQ, live_NQ, token_NJS, seen_NJQS
