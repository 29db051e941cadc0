"""What the blocks of a model routed in depth or in attention execute, beside what the dense model
would: FLOPs of the matrix products of attention and feed-forward, and of the choice of blocks.
Embedding, norms and head are alike in both."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moe_router.config import ModelConfig
from moe_router.models.attend_routed import Executed
from moe_router.models.cached import CachedLayer
from moe_router.routing import Ledger


class Account:
    """Of one forward pass.

    Args:
        config: of the model.
        ledger: where it goes.
        lengths: of the sequences that came in.
        position_T: of their tokens.
        causal: a token attends to the earlier ones alone.
    """

    def __init__(
        self,
        config: ModelConfig,
        ledger: Ledger,
        lengths: Sequence[int],
        position_T: Tensor,
        *,
        causal: bool,
    ) -> None:
        self._config, self._ledger, self._causal = config, ledger, causal
        self._tokens = sum(lengths)
        # a token of a causal model sees its position + 1 keys, whatever part of them is cached
        self._pairs = position_T.long().sum() + self._tokens if causal else _pairs(lengths, False)

    def block(
        self,
        layer: int,
        ran: Sequence[int],
        cache: CachedLayer | None,
        fed: Sequence[int] | None = None,
        attended: Executed | None = None,
    ) -> None:
        """Count a block that has run.

        Args:
            ran: tokens of each sequence that it computed.
            cache: its own, the new tokens in it.
            fed: those that its feed-forward computed, where tokens merged; None: the same.
            attended: what its routed attention computed; None: it was dense.
        """
        D, tokens = self._config.dim, sum(ran)
        pairs: Tensor | int = _pairs(ran, self._causal)
        if cache is not None and tokens:
            new_B = torch.tensor(ran).to(cache.length_B.device, non_blocking=True)
            pairs = (new_B * (cache.length_B - new_B)).sum() + pairs
        choosing = 0
        if attended is not None:
            pairs, choosing = attended.pairs(), attended.choosing
        self._ledger.add(
            "attention",
            _attention(self._config, tokens, pairs) + choosing,
            _attention(self._config, self._tokens, self._pairs),
        )
        tokens = tokens if fed is None else sum(fed)
        moe = self._config.moe
        if moe is None or not self._config.is_moe(layer):
            row = 6 * D * self._config.hidden
            self._ledger.add("mlp", tokens * row, self._tokens * row)
            return
        # the layer itself counts the tokens that came to it
        self._ledger.add("experts", 0, (self._tokens - tokens) * 6 * D * moe.top_k * moe.hidden)
        shared = 6 * D * moe.shared_hidden
        self._ledger.add("shared", tokens * shared, self._tokens * shared)


def flops_of_blocks(
    config: ModelConfig, lengths: Sequence[int], *, causal: bool
) -> list[tuple[float, float]]:
    """Of each block, for one token of sequences of these lengths: without the experts it chooses,
    and of those, if none is a null expert."""
    tokens, out = max(sum(lengths), 1), []
    for layer in range(config.steps):
        width, chosen, moe = config.hidden, 0, config.moe
        if moe is not None and config.is_moe(layer):
            width, chosen = moe.shared_hidden, moe.top_k * moe.hidden
        attention = _attention(config, tokens, _pairs(lengths, causal)) / tokens
        out.append((attention + 6 * config.dim * width, 6.0 * config.dim * chosen))
    return out


def _attention(config: ModelConfig, tokens: int, pairs: Tensor | int) -> Any:
    width, kv_width = (config.channels * n for n in (config.heads, config.kv_heads))
    project = 2 * (2 * config.dim * width + 2 * config.dim * kv_width)
    return tokens * project + 4 * width * pairs


def _pairs(lengths: Sequence[int], causal: bool) -> int:
    """Queries and the keys they see."""
    return sum(n * (n + 1) // 2 if causal else n * n for n in lengths)
