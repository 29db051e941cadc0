"""Attention of packed sequences to the blocks that a router chose."""

import logging
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from moe_router.config_attention import AttentionConfig
from moe_router.models.attend import attend_packed
from moe_router.models.packing import Packing
from moe_router.routing.blocks import BlockRouter, Blocks
from moe_router_kernels.attention_op import attend_blocks

_log = logging.getLogger(__name__)
Count = Callable[[], Tensor | int]


class Executed(NamedTuple):
    """Attributes:
    pairs: counts queries and the keys they saw, mean over heads: for who asks, it takes launches.
    choosing: FLOPs of the choice.
    """

    pairs: Count
    choosing: int


class Chosen(NamedTuple):
    """Attributes:
    y_THC: what attention gives.
    executed: what was computed.
    target_NJK: int32, the key blocks of each query block; None: attention was dense.
    weight_NJK: what each is weighed by; None: 1.
    losses: of the choice, unscaled, this rank's share; None: it has none.
    """

    y_THC: Tensor
    executed: Executed
    target_NJK: Tensor | None = None
    weight_NJK: Tensor | None = None
    losses: dict[str, Tensor] | None = None


class RoutedAttention:
    """Args:
    config: block, top_k, window, and how blocks are scored.
    layer: names the noise of a control.
    kernels: see `Router`.
    """

    def __init__(self, config: AttentionConfig, layer: int = 0, kernels: str = "auto") -> None:
        self.config, self.kernels = config, kernels
        self.router = BlockRouter(config, layer, kernels)

    def __call__(
        self, q_THC: Tensor, k_TJC: Tensor, v_TJC: Tensor, packing: Packing, step: int | None = None
    ) -> Chosen:
        """Queries to keys of whole sequences.

        Args:
            step: of training, if it is not over.
        """
        J, blocks = k_TJC.size(1), packing.blocks(self.config.block)
        top_k = self.config.eased(blocks.most, step)
        if self.sees_all(blocks.most, top_k):
            y_THC = attend_packed(q_THC, k_TJC, v_TJC, packing)
            return Chosen(y_THC, Executed(lambda: packing.pairs, 0))
        target_NJK, count_NJ2, weight_NJK = self.router.lists(q_THC, k_TJC, blocks, step)
        y_THC = attend_blocks(
            q_THC, k_TJC, v_TJC, blocks.first_N, blocks.last_N, target_NJK, blocks.size,
            gate_NJK=weight_NJK, count_NJ2=count_NJ2,
            causal=packing.causal, kernels=self.kernels,
        )  # fmt: skip
        N, kv_width = len(blocks.own_N), J * k_TJC.size(2)
        choosing = self.config.choosing(N, N, kv_width, blocks.most)
        executed = Executed(partial(pairs_of, target_NJK, blocks), choosing)
        return Chosen(y_THC, executed, target_NJK, weight_NJK)

    def sees_all(self, blocks: int, top_k: int) -> bool:
        """Whether all of a sequence's blocks are chosen and weighed alike: attention is dense."""
        if blocks > top_k or (self.config.gated and blocks > 0):
            return False
        if blocks <= self.config.top_k:
            _say_dense(self.config.top_k, self.config.block)
        return True


def pairs_of(target_NJK: Tensor, blocks: Blocks) -> Tensor:
    """Queries and the keys they see, mean over KV heads."""
    J, own_N11 = target_NJK.size(1), blocks.own_N[:, None, None]
    size_N = (blocks.last_N - blocks.first_N).long()
    size_N11 = size_N[:, None, None]
    pairs_NJK = size_N11 * size_N[target_NJK.clamp(min=0)] * (target_NJK >= 0)
    if blocks.causal:
        half_N11 = size_N11 * (size_N11 + 1) // 2
        pairs_NJK = torch.where(target_NJK == own_N11, half_N11, pairs_NJK)
    return pairs_NJK.sum() // J


@cache
def _say_dense(top_k: int, block: int) -> None:
    _log.info(
        "model.attention.top_k=%d blocks of %d tokens hold a whole text: its attention is dense",
        top_k,
        block,
    )
