"""Routing inside attention: which blocks of keys a block of queries attends to. A unit is a query
block and a KV head, which all query heads of it share; a group is a key block and a KV head.

Causal attention chooses for a whole query block by its first token, the only one of which all
others are later: no choice depends on a token that comes after it, and the cache's decoding step
chooses as the whole text did.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_router.types import Choice
from moe_router_kernels import reference
from moe_router_kernels.block_choice_op import block_means, choose_blocks


@dataclass(frozen=True, slots=True)
class Blocks:
    """Packed sequences in blocks of at most `size` tokens; none crosses from one to the next.

    Attributes:
        first_N, last_N: int32, where each block begins and ends.
        low_N, high_N: int32, key blocks low..high-1 that the queries of a block may see.
        most: blocks of the longest sequence.
    """

    size: int
    causal: bool
    most: int
    first_N: Tensor
    last_N: Tensor
    low_N: Tensor
    high_N: Tensor

    @classmethod
    def of(
        cls, lengths: Sequence[int], size: int, device: torch.device, *, causal: bool = True
    ) -> "Blocks":
        """Cut sequences of these lengths; the last block of one may be shorter."""
        rows: list[tuple[int, int, int, int]] = []
        start = most = 0
        for length in lengths:
            low, blocks = len(rows), -(-length // size)
            for n in range(blocks):
                first = start + n * size
                high = low + (n + 1 if causal else blocks)
                rows.append((first, min(first + size, start + length), low, high))
            start, most = start + length, max(most, blocks)
        bounds = torch.tensor(rows, dtype=torch.int32).view(-1, 4).T.contiguous()
        return cls(size, causal, most, *bounds.to(device, non_blocking=True))


def route_blocks(
    q_THd: Tensor,
    k_TJd: Tensor,
    blocks: Blocks,
    *,
    top_k: int,
    window: int = 0,
    gated: bool = False,
    kernels: str = "auto",
) -> Choice:
    """Choose key blocks: a block's own, those of the window, then the best by score, K in all.

    Args:
        q_THd, k_TJd: queries and keys as attention sees them; H a multiple of J.
        top_k: K.
        window: so many tokens before a query block (after it too, where attention is not causal)
            are always chosen, rounded up to whole blocks.
        gated: weigh a block chosen by score by p = sigmoid(score), through which the router
            learns, and the others by 1; else all by 1.

    Returns:
        Choice of T = N J units (block by block) among G = N J groups, n J + j.
    """
    near = -(-window // blocks.size)
    with torch.autocast(q_THd.device.type, enabled=False):
        score_NJN = block_scores(q_THd, k_TJd, blocks, kernels)
        target_NJK = choose_blocks(score_NJN, blocks.low_N, blocks.high_N, top_k, near, kernels)
        weight_NJK = (target_NJK >= 0).float()
        if gated:
            n_N11 = torch.arange(len(target_NJK), device=target_NJK.device)[:, None, None]
            p_NJK = score_NJN.gather(-1, target_NJK.clamp(min=0).long()).sigmoid()
            always_NJK = (target_NJK - n_N11).abs() <= near
            weight_NJK = torch.where(always_NJK, 1.0, p_NJK) * weight_NJK
    J = target_NJK.size(1)
    head_J1 = torch.arange(J, device=target_NJK.device, dtype=torch.int32)[:, None]
    group_NJK = torch.where(target_NJK < 0, -1, target_NJK * J + head_J1)
    return Choice(group_NJK.flatten(0, 1), weight_NJK.flatten(0, 1))


def block_scores(q_THd: Tensor, k_TJd: Tensor, blocks: Blocks, kernels: str = "auto") -> Tensor:
    """(N, J, N) fp32: of what a query block asks for, with the mean key of each block."""
    J, d = k_TJd.shape[1:]
    bounds = (blocks.first_N, blocks.last_N, J, blocks.size, kernels)
    if blocks.causal:
        query_NHd = reference.wide(q_THd[blocks.first_N])
        query_NJd = query_NHd.view(len(query_NHd), J, q_THd.size(1) // J, d).mean(2)
    else:
        query_NJd = block_means(q_THd, *bounds)
    key_NJd = block_means(k_TJd, *bounds)
    score_NJN: Tensor = torch.einsum("njd,mjd->njm", query_NJd, key_NJd) * d**-0.5
    return score_NJN
