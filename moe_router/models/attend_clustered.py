"""Attention of packed sequences inside the clusters that a router chose, beside a window and global
tokens."""

from functools import partial

import torch
from torch import Tensor, nn

from moe_router.config import AttentionConfig, ModelConfig
from moe_router.models.attend_routed import Chosen, Executed
from moe_router.models.packing import Packing
from moe_router.routing import Context
from moe_router.routing.clusters import Clustered, ClusterRouter
from moe_router.types import Total, same
from moe_router_kernels import reference_attention
from moe_router_kernels.cluster_attention import Rows, attend_clusters, sort_by_cluster
from moe_router_kernels.near_attention import Band


class ClusteredAttention(nn.Module):
    """Args:
    config: of the model.
    how: clusters, window, global tokens.
    layer: names the noise.
    kernels: see `Router`.
    total: sums a tensor over all ranks.
    """

    def __init__(
        self,
        config: ModelConfig,
        how: AttentionConfig,
        layer: int = 0,
        kernels: str = "auto",
        *,
        total: Total = same,
    ) -> None:
        super().__init__()
        self.config, self.kernels = how, kernels
        self.router = ClusterRouter(config.dim, config.kv_heads, how, layer, total=total)

    def forward(
        self,
        x_TD: Tensor,
        q_THC: Tensor,
        k_TJC: Tensor,
        v_TJC: Tensor,
        packing: Packing,
        context: Context,
    ) -> Chosen:
        """Queries to keys of whole sequences; x_TD are the states they were made of."""
        clusters = self.router(x_TD, packing.rank_T, packing.offsets_B1, context)
        return self.attend(q_THC, k_TJC, v_TJC, packing, clusters)

    def attend(
        self, q_THC: Tensor, k_TJC: Tensor, v_TJC: Tensor, packing: Packing, clusters: Clustered
    ) -> Chosen:
        """The same, once clusters are chosen."""
        how, (cluster_TJ, weight_TJ, losses) = self.config, clusters
        qkv, near = (q_THC, k_TJC, v_TJC), (how.window, how.global_tokens)
        offsets_B1 = packing.offsets_B1
        sizes = (how.clusters, how.block, packing.longest, self.kernels)
        rows = sort_by_cluster(offsets_B1, cluster_TJ, *sizes)
        blocks, band = packing.blocks(how.block), None
        if any(near):
            low_N = blocks.first_N[blocks.low_N]
            bounds = (blocks.first_N, blocks.last_N, low_N)
            band = Band(*bounds, how.block, *near, packing.tokens)
        if self.kernels == "reference":
            y_THC = reference_attention.attend_clusters(*qkv, offsets_B1, *clusters[:2], *near)
        else:
            y_THC = attend_clusters(
                *qkv, cluster_TJ, weight_TJ, rows, band, how.block, kernels=self.kernels
            )
        pairs = partial(_pairs_of, rows, band, cluster_TJ)
        return Chosen(y_THC, Executed(pairs, self.router.flops(packing.tokens)), losses=losses)


def _pairs_of(rows: Rows, band: Band | None, cluster_TJ: Tensor) -> Tensor:
    """Queries and the keys they see, mean over KV heads."""
    size_N = (rows.last_N - rows.first_N).long()
    size_N = torch.where(rows.count_N12[:, 0, 1] > 0, size_N, 0)
    before_N = rows.first_N - rows.first_N[(rows.target_N1K[:, 0, 0]).clamp(min=0).long()]
    pairs = (size_N * before_N + size_N * (size_N + 1) // 2).sum()
    if band is not None:
        pairs = pairs + band.seen(cluster_TJ).sum()
    return pairs // max(cluster_TJ.size(1), 1)
