"""Which earlier blocks are the best for a query block, without a score of all: a tree over the
blocks of a sequence, in which a node is worth its mean key. From the root down, the best nodes of a
level are opened, so n blocks choose in O(n log n).

A node that holds the query block itself, or later ones, is not scored but opened: its mean would
know of later tokens.
"""

import torch
from torch import Tensor

AT_ONCE = 1 << 26  # numbers gathered for one product


def best_in_tree(
    query_MJd: Tensor,
    key_NJd: Tensor,
    rank_M: Tensor,
    low_M: Tensor,
    levels: int,
    branch: int,
    *,
    keep: int,
    near: int,
) -> tuple[Tensor, Tensor]:
    """(M, J, keep) blocks that a beam search of that width finds, -1 for none, and their scores.

    Args:
        query_MJd, key_NJd: what query blocks ask for, and the mean key of each block.
        rank_M: how many blocks of its sequence stand before each query block.
        low_M: the first block of its sequence.
        levels: of the tree over the longest sequence, `branch` nodes under each.
        near: blocks right before the query block that are not wanted: they are chosen anyway.
    """
    _, J, d = query_MJd.shape
    # sums up to each block, in fp64: a difference of two is exact whatever stands before it
    sum_NJd = torch.cat([key_NJd.new_zeros(1, J, d).double(), key_NJd.double().cumsum(0)])
    few = max(1, AT_ONCE // (J * (keep + 1) * branch * d))
    parts = (torch.split(x, few) for x in (query_MJd, rank_M.long(), low_M.long()))
    how = (sum_NJd, levels, branch, keep, near)
    found = [_search(q, rank, low, *how) for q, rank, low in zip(*parts, strict=True)]
    id_MJK, score_MJK = (torch.cat(x) for x in zip(*found, strict=True))
    return id_MJK, score_MJK


def _means(sum_NJd: Tensor, size: int) -> Tensor:
    """Mean keys of `size` blocks from each on; 0 where there are not so many."""
    mean_NJd = torch.zeros_like(sum_NJd)
    if size < len(sum_NJd):
        mean_NJd[:-size] = (sum_NJd[size:] - sum_NJd[:-size]) / size
    return mean_NJd


def _search(
    query_MJd: Tensor,
    rank_M: Tensor,
    low_M: Tensor,
    sum_NJd: Tensor,
    levels: int,
    branch: int,
    keep: int,
    near: int,
) -> tuple[Tensor, Tensor]:
    M, J, d = query_MJd.shape
    none = len(sum_NJd)
    child = torch.arange(branch, device=rank_M.device)
    head_J1 = torch.arange(J, device=rank_M.device)[:, None]
    kept_MJK = rank_M.new_full((M, J, 0), -1)
    score_MJK = query_MJd.new_empty(M, J, 0)
    for level in reversed(range(levels)):
        size = branch**level
        # in ascending order: opened nodes, then those beside the one that holds the query block
        opened = torch.where(kept_MJK < 0, -branch, kept_MJK * branch)[..., None] + child
        beside_MB = (rank_M // (size * branch))[:, None] * branch + child
        node_MJC = torch.cat([opened.flatten(2), beside_MB[:, None].expand(M, J, branch)], -1)
        whole = (node_MJC >= 0) & (node_MJC < (rank_M // size)[:, None, None])
        if level == 0:
            whole = whole & (node_MJC < (rank_M - near)[:, None, None])
        first = torch.where(whole, low_M[:, None, None] + node_MJC * size, 0)
        mean_NJd = _means(sum_NJd, size).to(query_MJd.dtype)
        mean_MJCd = mean_NJd[first, head_J1]
        score_MJC = torch.einsum("mjd,mjcd->mjc", query_MJd, mean_MJCd) * d**-0.5
        score_MJC = torch.where(whole, score_MJC, float("-inf"))
        order = score_MJC.argsort(dim=-1, descending=True, stable=True)[..., :keep].sort(-1).values
        there = whole.gather(-1, order)
        kept_MJK = torch.where(there, node_MJC.gather(-1, order), -1)
        score_MJK = score_MJC.gather(-1, order)
        # those that are none come last, for the order of the next level
        kept_MJK, place = torch.where(kept_MJK < 0, none, kept_MJK).sort(stable=True, dim=-1)
        kept_MJK = torch.where(kept_MJK < none, kept_MJK, -1)
        score_MJK = score_MJK.gather(-1, place)
    return torch.where(kept_MJK < 0, -1, kept_MJK + low_M[:, None, None]), score_MJK
