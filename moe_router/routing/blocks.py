"""Routing inside attention: which blocks of keys a block of queries attends to. A unit is a query
block and a KV head, which all query heads of it share; a group is a key block and a KV head.

Causal attention chooses for a whole query block by its first token, the only one of which all
others are later: no choice depends on a token that comes after it, and decoding with a cache
chooses as one pass over the text does.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from moe_router.config_attention import AttentionConfig
from moe_router.routing.block_tree import best_in_tree
from moe_router.types import Choice
from moe_router_kernels import reference
from moe_router_kernels.block_choice_op import block_means, choose_blocks, route_blocks


@dataclass(frozen=True, slots=True)
class Blocks:
    """Packed sequences in blocks of at most `size` tokens; none crosses from one to the next.

    Attributes:
        most: blocks of the longest sequence.
        first_N, last_N: int32, where each block begins and ends.
        low_N, high_N: int32, key blocks low..high-1 that the queries of a block may see.
        own_N: int32, 0..N-1.
    """

    size: int
    causal: bool
    most: int
    first_N: Tensor
    last_N: Tensor
    low_N: Tensor
    high_N: Tensor
    own_N: Tensor

    @classmethod
    def of(
        cls, lengths: Sequence[int], size: int, device: torch.device, *, causal: bool = True
    ) -> "Blocks":
        """Cut sequences of these lengths; the last block of one may be shorter."""
        rows: list[tuple[int, ...]] = []
        start = most = 0
        for length in lengths:
            low, blocks = len(rows), -(-length // size)
            for n in range(blocks):
                first = start + n * size
                high = low + (n + 1 if causal else blocks)
                rows.append((first, min(first + size, start + length), low, high, low + n))
            start, most = start + length, max(most, blocks)
        bounds = torch.tensor(rows, dtype=torch.int32).view(-1, 5).T.contiguous()
        return cls(size, causal, most, *bounds.to(device, non_blocking=True))


class Lists(NamedTuple):
    """Attributes:
    target_NJK: int32, key blocks of each query block and KV head, then -1.
    count_NJ2: int32, how many come first that need no mask, and how many there are; None: nobody
        has counted.
    weight_NJK: fp32, what each is weighed by; None: 1.
    """

    target_NJK: Tensor
    count_NJ2: Tensor | None = None
    weight_NJK: Tensor | None = None


class BlockRouter:
    """Chooses key blocks: a block's own, those of the window, then the best by score. It has no
    weights of its own: queries and keys are what learns.

    Args:
        config: how many, and by what they are scored.
        layer: names the noise of the random control.
        kernels: see `Router`.
    """

    def __init__(self, config: AttentionConfig, layer: int = 0, kernels: str = "auto") -> None:
        self.config, self.layer, self.kernels = config, layer, kernels

    def __call__(
        self, q_THd: Tensor, k_TJd: Tensor, blocks: Blocks, step: int | None = None
    ) -> Choice:
        """Choose for packed sequences.

        Args:
            q_THd, k_TJd: queries and keys as attention sees them; H a multiple of J.
            step: of training, if it is not over.

        Returns:
            Choice of T = N J units (block by block) among G = N J groups, n J + j; weights are 1,
            or where `gated` p = sigmoid(score) of a block chosen by score.
        """
        J, chosen = k_TJd.size(1), self.lists(q_THd, k_TJd, blocks, step)
        weight_NJK = chosen.weight_NJK
        if weight_NJK is None:
            weight_NJK = (chosen.target_NJK >= 0).float()
        head_J1 = torch.arange(J, device=weight_NJK.device, dtype=torch.int32)[:, None]
        group_NJK = torch.where(chosen.target_NJK < 0, -1, chosen.target_NJK * J + head_J1)
        return Choice(group_NJK.flatten(0, 1), weight_NJK.flatten(0, 1))

    def lists(self, q_THd: Tensor, k_TJd: Tensor, blocks: Blocks, step: int | None = None) -> Lists:
        """The same, as attention wants it."""
        config = self.config
        top_k = config.eased(blocks.most, step)
        bounds = (blocks.own_N, blocks.low_N, blocks.high_N)
        with torch.autocast(q_THd.device.type, enabled=False):  # scores are fp32
            if config.router == "keys" and not config.branch and not config.gated:
                where = (blocks.first_N, blocks.last_N, *bounds, blocks.size, top_k, config.near)
                by = self.kernels
                return Lists(*route_blocks(q_THd, k_TJd, *where, causal=blocks.causal, kernels=by))
            summaries = self._summaries(q_THd, k_TJd, blocks)
            target_NJK, weight_NJK = self.choose(*summaries, *bounds, blocks.most, top_k)
        return Lists(target_NJK, None, weight_NJK if config.gated else None)

    def _summaries(self, q_THd: Tensor, k_TJd: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor]:
        """(N, J, d) fp32: what each block asks for, and the mean of its keys."""
        J, d = k_TJd.shape[1:]
        bounds = (blocks.first_N, blocks.last_N, J, blocks.size, self.kernels)
        if blocks.causal:
            query_NHd = reference.wide(q_THd[blocks.first_N])
            query_NJd = query_NHd.view(len(query_NHd), J, q_THd.size(1) // J, d).mean(2)
        else:
            query_NJd = block_means(q_THd, *bounds)
        return query_NJd, block_means(k_TJd, *bounds)

    def choose(
        self,
        query_MJd: Tensor,
        key_NJd: Tensor,
        own_M: Tensor,
        low_M: Tensor,
        high_M: Tensor,
        blocks: int,
        top_k: int,
    ) -> tuple[Tensor, Tensor]:
        """(M, J, K) int32 key blocks of M query blocks, ascending, then -1; and fp32 what each is
        weighed by.

        Args:
            query_MJd, key_NJd: what query blocks ask for, and the mean key of key blocks.
            own_M, low_M, high_M: which key block each query block is, and low..high-1, which it may
                see, all of its sequence.
            blocks: of the longest sequence.
        """
        near, J = self.config.near, key_NJd.size(1)
        if self.config.branch == 0:
            score_MJN = self._score(query_MJd, key_NJd, own_M, low_M)
            bounds = (own_M, low_M, high_M)
            target_MJK = choose_blocks(score_MJN, *bounds, top_k, near, self.kernels)
            score_MJK = score_MJN.gather(-1, target_MJK.clamp(min=0).long())
        else:
            keep, tree = top_k - near - 1, (self.config.levels(blocks), self.config.branch)
            ranks = (own_M - low_M, low_M)
            best = best_in_tree(query_MJd, key_NJd, *ranks, *tree, keep=keep, near=near)
            always_MX = own_M[:, None] + torch.arange(-near, 1, device=own_M.device)
            always_MX = torch.where(always_MX < low_M[:, None], -1, always_MX)
            always_MJX = always_MX[:, None].expand(-1, J, -1)
            target_MJK = torch.cat([best[0], always_MJX], -1).int()
            score_MJK = torch.cat([best[1], torch.zeros_like(always_MJX).to(best[1])], -1)
            last = torch.where(target_MJK < 0, len(key_NJd), target_MJK)
            order = last.argsort(dim=-1, stable=True)
            target_MJK, score_MJK = target_MJK.gather(-1, order), score_MJK.gather(-1, order)
        return target_MJK, self._weigh(target_MJK, score_MJK, own_M)

    def _score(self, query_MJd: Tensor, key_NJd: Tensor, own_M: Tensor, low_M: Tensor) -> Tensor:
        """(M, J, N) fp32, of M query blocks for N key blocks.

        Args:
            own_M, low_M: which key block each is, and which is the first of its sequence.
        """
        if self.config.router == "keys":
            product_MJN = torch.einsum("mjd,njd->mjn", query_MJd, key_NJd)
            score_MJN: Tensor = product_MJN * query_MJd.size(-1) ** -0.5
            return score_MJN
        M, N, J = len(query_MJd), len(key_NJd), key_NJd.size(1)
        rank_MN = torch.arange(N, device=own_M.device) - low_M[:, None]
        if self.config.router == "position":  # the same blocks for all: the first of a sequence
            return -rank_MN[:, None].expand(M, J, N).float()
        noise_NX = reference.uniform_noise(0, 0, self.layer, 0, N, N * J, own_M.device)
        head_J1 = torch.arange(J, device=own_M.device)[:, None]
        column_MJN = rank_MN.clamp(min=0)[:, None] * J + head_J1
        row_M11 = (own_M - low_M).long()[:, None, None]
        noise_MJN: Tensor = noise_NX[row_M11, column_MJN]
        return noise_MJN

    def _weigh(self, target_MJK: Tensor, score_MJK: Tensor, own_M: Tensor) -> Tensor:
        weight_MJK = (target_MJK >= 0).to(score_MJK.dtype)
        if not self.config.gated:
            return weight_MJK
        always_MJK = (target_MJK - own_M[:, None, None]).abs() <= self.config.near
        p_MJK = torch.where(weight_MJK > 0, score_MJK, 0.0).sigmoid()
        return torch.where(always_MJK, 1.0, p_MJK) * weight_MJK
