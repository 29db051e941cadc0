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
    cluster_T = top_k(routing_scores_TC, 1)[:, 0]
    return cluster_mask(offsets_B1, cluster_T, window, global_tokens)


def cluster_mask(
    offsets_B1: Tensor, cluster_T: Tensor, window: int = 0, global_tokens: int = 0
) -> Tensor:
    """`generate_mask`, by the cluster of each token."""
    sequence_T = sequence_of(offsets_B1, cluster_T.numel())
    token_T = torch.arange(cluster_T.numel(), device=sequence_T.device)
    position_T = token_T - offsets_B1.long()[sequence_T]
    allowed_TT = cluster_T[:, None] == cluster_T
    allowed_TT |= token_T[:, None] - token_T <= window
    allowed_TT |= position_T < global_tokens
    return allowed_TT & _causal(sequence_T)


def _causal(sequence_T: Tensor) -> Tensor:
    """(T, T) bool: the same sequence, and not later."""
    token_T = torch.arange(sequence_T.numel(), device=sequence_T.device)
    return (sequence_T[:, None] == sequence_T) & (token_T[:, None] >= token_T)


def block_means(x_THd: Tensor, first_N: Tensor, last_N: Tensor, kv_heads: int) -> Tensor:
    """(N, J, d) fp32: the mean over the tokens of a block and the heads that share a KV head.

    Args:
        first_N, last_N: int32, where each block begins and ends; they are all of T.
    """
    T, H, d = x_THd.shape
    x_TJd = wide(x_THd).view(T, kv_heads, H // max(kv_heads, 1), d).mean(2)
    sizes = (last_N - first_N).tolist()
    means = [part.mean(0) for part in torch.split(x_TJd, sizes)]
    return torch.stack(means) if means else x_TJd


def choose_blocks(
    score_MJN: Tensor, own_M: Tensor, low_M: Tensor, high_M: Tensor, k: int, window: int = 0
) -> Tensor:
    """(M, J, K) int32: key blocks of each (query block, KV head), ascending, then -1.

    A query block takes its own block and those at most `window` away, then the best of the others
    among blocks low..high-1, K in all; of equals the lower, NaN last.

    Args:
        score_MJN: of each (query block, KV head) for each of N key blocks.
        own_M: int32, which key block a query block is.
        low_M, high_M: int32, key blocks that it may choose among: of its sequence, and where
            attention is causal up to itself.

    Source: MoBA, Lu et al. 2025, arXiv:2502.13189, section 2.2, with query blocks for queries.
    """
    M, J, N = score_MJN.shape
    ids_N = torch.arange(N, device=score_MJN.device)
    inside_MN = (ids_N >= low_M[:, None]) & (ids_N < high_M[:, None])
    near_MN = (ids_N - own_M[:, None]).abs() <= window
    score_MJN = score_MJN.masked_fill(score_MJN.isnan(), -1e30)
    score_MJN = score_MJN.masked_fill(near_MN[:, None], float("inf"))
    score_MJN = score_MJN.masked_fill(~inside_MN[:, None], float("-inf"))
    ranked_MJK = score_MJN.argsort(dim=-1, descending=True, stable=True)[..., :k]
    there_MJK = inside_MN[:, None].expand(M, J, N).gather(-1, ranked_MJK)
    target_MJK = torch.where(there_MJK, ranked_MJK, N).sort(-1).values
    target_MJK = torch.nn.functional.pad(target_MJK, (0, k - target_MJK.size(-1)), value=N)
    return torch.where(target_MJK < N, target_MJK, -1).int()


def route_blocks(
    q_THd: Tensor,
    k_TJd: Tensor,
    first_N: Tensor,
    last_N: Tensor,
    own_N: Tensor,
    low_N: Tensor,
    high_N: Tensor,
    block: int,
    k: int,
    window: int = 0,
    causal: bool = True,
) -> tuple[Tensor, Tensor]:
    """Choose by what a query block asks for times the mean key of each block.

    It asks by its first token where attention is causal, else by the mean of all its tokens.

    Returns:
        `choose_blocks`; and (N, J, 2) int32, how many of them need no mask, which come first, and
        how many there are.
    """
    J, d = k_TJd.shape[1:]
    query_NJd = block_means(q_THd, first_N, last_N, J)
    if causal:
        query_NHd = wide(q_THd[first_N])
        query_NJd = (
            query_NHd.view(len(query_NHd), J, -1, d).mean(2) if len(query_NHd) else query_NJd
        )
    key_NJd = block_means(k_TJd, first_N, last_N, J)
    score_NJN = torch.einsum("njd,mjd->njm", query_NJd, key_NJd) * d**-0.5
    target_NJK = choose_blocks(score_NJN, own_N, low_N, high_N, k, window)
    there_NJK = target_NJK >= 0
    # its own block is masked where a query may not look ahead; where it may, gaps are
    gap_N = last_N - first_N < block
    own_NJK = target_NJK == own_N[:, None, None]
    masked_NJK = own_NJK if causal else gap_N[target_NJK.clamp(min=0)]
    count_NJ2 = torch.stack([(there_NJK & ~masked_NJK).sum(-1), there_NJK.sum(-1)], -1)
    return target_NJK, count_NJ2.int()


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


def attend_clusters(
    q_THd: Tensor,
    k_TJd: Tensor,
    v_TJd: Tensor,
    offsets_B1: Tensor,
    cluster_TJ: Tensor,
    weight_TJ: Tensor,
    window: int = 0,
    global_tokens: int = 0,
) -> Tensor:
    """(T, H, d): attention under the mask of each KV head's clusters.

    Shares of tokens of one cluster are multiplied by p_ij, the product of their weights; those of
    tokens that are seen without being of the query's cluster by 1.

    Args:
        offsets_B1, window, global_tokens: of `generate_mask`.
        cluster_TJ, weight_TJ: of each token for each KV head.
    """
    masks = [cluster_mask(offsets_B1, c_T, window, global_tokens) for c_T in cluster_TJ.T]
    alike_JTT = cluster_TJ.T[:, :, None] == cluster_TJ.T[:, None, :]
    gate_JTT = torch.where(alike_JTT, weight_TJ.T[:, :, None] * weight_TJ.T[:, None, :], 1.0)
    return masked_attention(q_THd, k_TJd, v_TJd, torch.stack(masks), gate_JTT)
