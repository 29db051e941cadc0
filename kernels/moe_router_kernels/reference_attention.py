"""The specification of routed attention, in plain torch: who attends to whom, and what comes of it.

T or S tokens, H query heads, J KV heads, d channels of a head, N blocks of tokens, K chosen blocks.
"""

import torch
from torch import Tensor

from moe_router_kernels.reference import sequence_of, top_k, wide


def generate_mask(
    offsets_B1: Tensor, routing_scores_TC: Tensor, window: int = 0, global_tokens: int = 0
) -> Tensor:
    """(T, T) bool: may query q (row) attend to key k (column)?

    Inside a sequence and never to a later token, q attends to the tokens of its own cluster, to
    the `window` tokens before it, to the first `global_tokens` of its sequence, and to itself.

    Args:
        offsets_B1: int32, bounds of the packed sequences.
        routing_scores_TC: scores of each token for C clusters; the highest is its cluster.
    """
    T = routing_scores_TC.size(0)
    sequence_T = sequence_of(offsets_B1, T)
    token_T = torch.arange(T, device=sequence_T.device)
    position_T = token_T - offsets_B1.long()[sequence_T]
    cluster_T = top_k(routing_scores_TC, 1)[:, 0]
    allowed_TT = cluster_T[:, None] == cluster_T
    allowed_TT |= token_T[:, None] - token_T <= window
    allowed_TT |= position_T < global_tokens
    return allowed_TT & _causal(sequence_T)


def _causal(sequence_T: Tensor) -> Tensor:
    """(T, T) bool: the same sequence, and not later."""
    token_T = torch.arange(sequence_T.numel(), device=sequence_T.device)
    return (sequence_T[:, None] == sequence_T) & (token_T[:, None] >= token_T)


def choose_blocks(q_SHd: Tensor, k_SJd: Tensor, block: int, k: int) -> Tensor:
    """(N, J, K) int32: key blocks of each (query block, KV head) of one sequence, -1 for none.

    A key block is summarised by its mean key, a query block by the mean of its queries over the
    query heads that share the KV head. A query block always takes its own block, then the best of
    the earlier ones; later ones never.

    Args:
        q_SHd, k_SJd: (S, heads, d) and (S, KV heads, d) of one sequence; H a multiple of J.
        block: tokens of a block; the last one may be shorter.
        k: blocks that each query block attends to, its own included.

    Source: MoBA, Lu et al. 2025, arXiv:2502.13189, section 2.2, with query blocks for queries.
    """
    J = k_SJd.size(1)
    q_SJd = wide(q_SHd).view(len(q_SHd), J, -1, q_SHd.size(2)).mean(2)
    query_NJd, key_NJd = (
        torch.stack([part.mean(0) for part in torch.split(x, block)]) for x in (q_SJd, wide(k_SJd))
    )
    N = key_NJd.size(0)
    score_JNN = torch.einsum("njd,mjd->jnm", query_NJd, key_NJd)
    ids_N = torch.arange(N, device=score_JNN.device)
    score_JNN = score_JNN.masked_fill(ids_N > ids_N[:, None], float("-inf"))
    score_JNN = score_JNN.masked_fill(ids_N == ids_N[:, None], float("inf"))
    ranked = score_JNN.argsort(dim=-1, descending=True, stable=True)[..., :k]
    ranked = ranked.masked_fill(ranked > ids_N[:, None], -1)
    return ranked.permute(1, 0, 2).int()


def block_mask(target_NJK: Tensor, tokens: int, block: int) -> Tensor:
    """(J, S, S) bool: what `choose_blocks` lets each query token of a KV head attend to."""
    ids_N = torch.arange(target_NJK.size(0), device=target_NJK.device)
    chosen_JNN = (target_NJK[..., None] == ids_N).any(2).transpose(0, 1)
    block_S = torch.arange(tokens, device=ids_N.device) // block
    seen_JSS = chosen_JNN[:, block_S][:, :, block_S]
    return seen_JSS & _causal(torch.zeros_like(block_S))


def masked_attention(
    q_SHd: Tensor,
    k_SJd: Tensor,
    v_SJd: Tensor,
    mask_JSS: Tensor,
    gate_JSS: Tensor | None = None,
) -> Tensor:
    """(S, H, d): softmax attention under a mask per KV head: the oracle of routed attention.

    Args:
        gate_JSS: p_ij, by which the share A_ij is multiplied after the softmax.
    """
    groups = q_SHd.size(1) // k_SJd.size(1)
    q, k, v = (
        wide(x).transpose(0, 1)
        for x in (
            q_SHd,
            k_SJd.repeat_interleave(groups, 1),
            v_SJd.repeat_interleave(groups, 1),
        )
    )
    score_HSS = q @ k.transpose(1, 2) * q.size(-1) ** -0.5
    mask_HSS = mask_JSS.repeat_interleave(groups, 0)
    weight_HSS = score_HSS.masked_fill(~mask_HSS, float("-inf")).softmax(-1)
    # a query without a key takes nothing, not the mean of nothing
    weight_HSS = torch.where(mask_HSS.any(-1, keepdim=True), weight_HSS, 0.0)
    if gate_JSS is not None:
        weight_HSS = weight_HSS * gate_JSS.repeat_interleave(groups, 0)
    out_HSd: Tensor = weight_HSS @ v
    return out_HSd.transpose(0, 1).to(q_SHd.dtype)


def attend_blocks(
    q_THd: Tensor,
    k_TJd: Tensor,
    v_TJd: Tensor,
    first_N: Tensor,
    last_N: Tensor,
    target_NJK: Tensor,
    gate_NJK: Tensor | None = None,
    *,
    causal: bool = True,
) -> Tensor:
    """(T, H, d): each query attends to the keys of the blocks that its own block has chosen.

    Args:
        first_N, last_N: int32, where each block begins and ends among the T packed tokens.
        target_NJK: int32, key blocks of each (query block, KV head), each once; -1 is none.
        gate_NJK: p of each choice: A'_ij = p_ij A_ij. None: 1.
        causal: never to a later token.
    """
    token_T = torch.arange(q_THd.size(0), device=q_THd.device)
    block_T = torch.searchsorted(last_N.long(), token_T, right=True)
    ids_N = torch.arange(first_N.numel(), device=token_T.device)
    pairs_NJKN = target_NJK[..., None] == ids_N
    mask_JTT = pairs_NJKN.any(2).transpose(0, 1)[:, block_T][:, :, block_T]
    if causal:
        mask_JTT = mask_JTT & (token_T[:, None] >= token_T)
    gate_JTT = None
    if gate_NJK is not None:
        gate_JNN = (pairs_NJKN * gate_NJK[..., None]).sum(2).transpose(0, 1)
        gate_JTT = gate_JNN[:, block_T][:, :, block_T]
    return masked_attention(q_THd, k_TJd, v_TJd, mask_JTT, gate_JTT)
