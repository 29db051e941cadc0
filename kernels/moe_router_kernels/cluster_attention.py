"""Attention inside clusters of tokens, beside a local window and global tokens. Specification:
`reference_attention.attend_clusters`.

Two disjoint sets of pairs, joined by the logs of their sums, so that it is one softmax:

- pairs of a cluster: rows are put in the order of (sequence, KV head, cluster), which is a Plan
  with one choice a token and KV head. There a mask of clusters is block-diagonal, every pair of a
  block but its own is seen, and the block-sparse kernel runs as it is.
- pairs of the window and of global tokens whose clusters differ: a band (`near_attention`).

In the order of the text a block of 64 queries is of nearly all clusters: a block-sparse kernel
would compute nearly everything, and mask it.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from moe_router_kernels.attention_op import attend_and_sum
from moe_router_kernels.choose import uses_triton
from moe_router_kernels.near_attention import Band, attend_near
from moe_router_kernels.ops import gather
from moe_router_kernels.plan_op import plan_from_ids
from moe_router_kernels.reference import sequence_of


class Rows(NamedTuple):
    """U = T J rows by cluster, in N blocks.

    Attributes:
        src_U, row_U1: int32, the row t J + j of each, and where each is now.
        first_N, last_N: int32, where each block begins and ends; the last ones may be empty.
        target_N1K: int32, the blocks of the same cluster up to its own.
        count_N12: int32, all but one, and all.
    """

    src_U: Tensor
    row_U1: Tensor
    first_N: Tensor
    last_N: Tensor
    target_N1K: Tensor
    count_N12: Tensor


def sort_by_cluster(
    offsets_B1: Tensor, cluster_TJ: Tensor, clusters: int, block: int, longest: int, kernels: str
) -> Rows:
    """Args:
    longest: tokens of the longest sequence: no cluster has more, so nothing waits for the device.
    """
    (T, J), B = cluster_TJ.shape, offsets_B1.numel() - 1
    head_J = torch.arange(J, device=cluster_TJ.device)
    group_TJ = (sequence_of(offsets_B1, T)[:, None] * J + head_J) * clusters + cluster_TJ
    group_U1, groups = group_TJ.int().view(T * J, 1), B * J * clusters
    src_U, _, offsets_G1, row_U1 = plan_from_ids(group_U1, groups, kernels)
    waits = not uses_triton("clusters", kernels, cluster_TJ.device)
    return Rows(src_U, row_U1, *_cut(offsets_G1, T * J, block, longest, waits))


def _cut(
    offsets_G1: Tensor, rows: int, block: int, longest: int, waits: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Groups of rows in blocks: first_N, last_N, target_N1K, count_N12 of `Rows`; as few blocks and
    choices as they take, if one may wait to be told."""
    start_G, size_G = offsets_G1[:-1].long(), offsets_G1.diff().long()
    blocks_G, groups = -(-size_G // block), size_G.numel()
    end_G = blocks_G.cumsum(0)
    N, K = rows // block + min(groups, rows), -(-longest // block)
    if waits and rows:
        N, K = int(end_G[-1]), int(blocks_G.max())
    n_N = torch.arange(N, device=end_G.device)
    group_N = torch.searchsorted(end_G, n_N, right=True)
    live_N, group_N = group_N < groups, group_N.clamp(max=max(groups - 1, 0))
    before_N = torch.where(live_N, n_N - (end_G - blocks_G)[group_N], 0)
    first_N = torch.where(live_N, start_G[group_N] + before_N * block, rows)
    last_N = torch.where(live_N, start_G[group_N] + size_G[group_N], rows)
    last_N = torch.minimum(first_N + block, last_N)
    target_NK = (n_N - before_N)[:, None] + torch.arange(K, device=n_N.device)
    target_NK = torch.where((target_NK <= n_N[:, None]) & live_N[:, None], target_NK, -1)
    count_N2 = torch.stack([before_N, before_N + live_N.long()], 1)
    return first_N.int(), last_N.int(), target_NK.int()[:, None], count_N2.int()[:, None]


def attend_clusters(
    q_THd: Tensor,
    k_TJd: Tensor,
    v_TJd: Tensor,
    cluster_TJ: Tensor,
    weight_TJ: Tensor,
    rows: Rows,
    band: Band | None,
    block: int,
    *,
    kernels: str = "auto",
) -> Tensor:
    """`reference_attention.attend_clusters`, differentiable; no other pair is computed.

    Args:
        rows: of `sort_by_cluster`, of the same clusters.
        band: window and global tokens; None: there are none.
        block: of queries and keys.
    """
    (T, H, d), J = q_THd.shape, k_TJd.size(1)
    if not T:
        return q_THd + (k_TJd.sum() + v_TJd.sum() + weight_TJ.sum()).to(q_THd.dtype)
    gated_TJd = (v_TJd * weight_TJ[..., None]).to(v_TJd.dtype)
    q_Ux, k_Ux, v_Ux = (
        gather(x.reshape(T * J, -1), rows.src_U, rows.row_U1) for x in (q_THd, k_TJd, gated_TJd)
    )
    sorted_UGd = (q_Ux.view(T * J, H // J, d), k_Ux[:, None], v_Ux[:, None])
    lists = (rows.first_N, rows.last_N, rows.target_N1K, rows.count_N12)
    out_UGd, lse_UG = attend_and_sum(*sorted_UGd, *lists, block, kernels=kernels)
    back = (rows.row_U1.flatten(), rows.src_U[:, None])
    out_THd = gather(out_UGd.flatten(1), *back).view(T, H, d)
    lse_TH = gather(lse_UG.contiguous(), *back).view(T, H)
    share_TH = weight_TJ.repeat_interleave(H // J, 1)
    if band is None:
        return (out_THd * share_TH[..., None]).to(q_THd.dtype)
    near_THd, near_TH = attend_near(q_THd, k_TJd, v_TJd, cluster_TJ, band)
    inside_TH1 = (lse_TH - near_TH).sigmoid()[..., None]
    joined = inside_TH1 * share_TH[..., None] * out_THd + (1 - inside_TH1) * near_THd
    return joined.to(q_THd.dtype)
