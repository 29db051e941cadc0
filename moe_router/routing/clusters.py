"""Which cluster each token attends in, for each KV head: Gumbel-softmax, straight through.

A token has one cluster as a query and as a key, so the mask is block-diagonal once tokens are
sorted. Its choice looks at the token alone: nothing depends on what comes later.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from moe_router.config_attention import FEATURES, AttentionConfig
from moe_router.routing.context import Context
from moe_router.routing.score import make_score
from moe_router.types import NoiseKey, Total, same
from moe_router_kernels import reference

OWN_NOISE = 1 << 16  # added to the layer: the jitter of experts has the numbers below


class Clustered(NamedTuple):
    """Attributes:
    cluster_TJ: int32, the cluster of each token for each KV head.
    weight_TJ: fp32, 1 with the gradient of p, the probability of that cluster; where `gated`, p.
    losses: unscaled, this rank's share.
    """

    cluster_TJ: Tensor
    weight_TJ: Tensor
    losses: dict[str, Tensor]


class ClusterRouter(nn.Module):
    """Source: Jang et al. 2017, arXiv:1611.01144, sections 2.1 and 2.2.

    Args:
        dim: hidden size D.
        kv_heads: J; the query heads of one share its clusters.
        config: how many clusters, and how they are scored.
        layer: names the noise.
        total: sums a tensor over all ranks, for the loss.
    """

    def __init__(
        self,
        dim: int,
        kv_heads: int,
        config: AttentionConfig,
        layer: int = 0,
        *,
        total: Total = same,
    ) -> None:
        super().__init__()
        self.config, self.kv_heads, self.layer, self.total = config, kv_heads, layer, total
        self.score: nn.Module | None = None
        if config.cluster_score is not None:
            groups = kv_heads * config.clusters
            self.score = make_score(dim, groups, config.cluster_score, FEATURES)

    def flops(self, tokens: int) -> int:
        """Of the scores of so many tokens."""
        return 2 * tokens * sum(p.numel() for p in self.parameters())

    def forward(
        self, x_TD: Tensor, place_T: Tensor, offsets_B1: Tensor, context: Context
    ) -> Clustered:
        """Choose, for the tokens of packed sequences.

        Args:
            x_TD: their normalised states.
            place_T: how many tokens of its sequence came before each.
        """
        config, step = self.config, context.step if self.training else None
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TJC = self._logits(x_TD, place_T)
            if self.training and config.noise:
                logits_TJC = logits_TJC + config.noise * self._gumbel(logits_TJC, context.key)
            logits_TJC[..., config.open_clusters(step) :] = -torch.inf
            cluster_TJ = context.recall("clusters", lambda: _highest(logits_TJC))
            if not (self.training or config.gated):
                return Clustered(cluster_TJ, torch.ones_like(logits_TJC[..., 0]), {})
            p_TJC = (logits_TJC / config.temperature).softmax(-1)
            p_TJ = p_TJC.gather(-1, cluster_TJ[..., None].long()).squeeze(-1)
            losses = {}
            if self.training and config.balance_loss:
                losses["cluster_balance"] = self._balance(p_TJC, cluster_TJ, offsets_B1, context)
            weight_TJ = p_TJ if config.gated else 1 + (p_TJ - p_TJ.detach())
        return Clustered(cluster_TJ, weight_TJ, losses)

    def _logits(self, x_TD: Tensor, place_T: Tensor) -> Tensor:
        """(T, J, C) fp32, of nobody else's."""
        J, C = self.kv_heads, self.config.clusters
        if self.score is not None:
            logits_TX: Tensor = self.score(x_TD, place_T)
            return logits_TX.view(-1, J, C).clone()
        # by the place alone, and the same in every step
        key = (0, 0, self.layer + OWN_NOISE, 0)
        places = int(place_T.max()) + 1 if len(place_T) else 0
        noise_PX = reference.uniform_noise(*key, places, J * C, x_TD.device)
        return noise_PX[place_T.long()].view(-1, J, C)

    def _gumbel(self, like_TJC: Tensor, key: NoiseKey) -> Tensor:
        T, J, C = like_TJC.shape
        named = (key.seed, key.step, self.layer + OWN_NOISE, key.first_token)
        uniform_TX = reference.uniform_noise(*named, T, J * C, like_TJC.device)
        # halfway between the 2**24 numbers that it may be: neither 0 nor 1
        return -(-(uniform_TX + 2.0**-25).log()).log().view(T, J, C)

    def _balance(
        self, p_TJC: Tensor, cluster_TJ: Tensor, offsets_B1: Tensor, context: Context
    ) -> Tensor:
        """1 where the clusters of each sequence are equally full, C where one has all of it."""
        _, J, C = p_TJC.shape
        count = p_TJC.new_full((), offsets_B1.numel() - 1)
        sequences = context.recall("clustered sequences", lambda: self.total(count))
        head_J = torch.arange(J, device=p_TJC.device)
        apart_TJ = cluster_TJ + head_J * C
        # J heads are J C groups with J choices a token: J times the mean of their losses
        loss = reference.sequence_balance_loss(p_TJC.flatten(1), apart_TJ, offsets_B1, sequences)
        return loss / J


def _highest(logits_TJC: Tensor) -> Tensor:
    """(T, J) int32; of equals the lower."""
    chosen_U1 = reference.top_k(logits_TJC.detach().flatten(0, 1), 1)
    return chosen_U1.view(logits_TJC.shape[:2])
