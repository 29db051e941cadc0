"""Token merging: tokens that say the same become one, which counts as many as it stands for.

Between a block's attention and its feed-forward, every second token of a sequence looks for the
most similar one among the others; the most similar pairs merge, by a mean weighted by size. What
attends to a token of size s sees it as s equal ones. Nothing is learned. A match looks at the whole
sequence, so merging is not causal.

Source: Bolya et al. 2022 (ToMe, arXiv:2210.09461), section 3; the first token of a sequence never
merges, as their class token. Keys are compared as queries see them, turned by their place: two
that are equal are equal to every query. A merged token keeps the place of the one that the others
joined.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_router.config import RoutingConfig
from moe_router.routing import Context
from moe_router.routing.depth import Kept, flops_of, keep_counted, part_of
from moe_router.routing.plan import plan_from_ids
from moe_router.routing.score import make_score
from moe_router.types import Plan, Tokens
from moe_router_kernels import gather, reference


@dataclass(frozen=True, slots=True)
class Merged:
    """Attributes:
    plan: every token has a row in its slot; M slots, `out: group`.
    slot_T: int64, the slot of each token.
    kept: the tokens that join no other: slot m is the m-th of them, and whoever joins it.
    """

    plan: Plan
    slot_T: Tensor
    kept: Kept

    def mean(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """(M, D) of x's dtype: the mean of each slot's tokens by size; (M,) fp32, their sizes."""
        plan, x_TD = self.plan, tokens.x_TD
        size_T = tokens.size_T
        if size_T is None:
            size_T = torch.ones(x_TD.size(0), device=x_TD.device)
        size_R = size_T[plan.src_R]
        x_RD = gather(reference.wide(x_TD), plan.src_R, plan.row_TK) * size_R[:, None]
        # by segments, not index_add: a fixed order of summation on every device
        bounds = plan.offsets_G1.long()
        size_M, sum_MD = (
            torch.segment_reduce(rows, "sum", offsets=bounds, axis=0, unsafe=True)
            for rows in (size_R, x_RD)
        )
        return (sum_MD / size_M[:, None]).to(x_TD.dtype), size_M


class Merge(nn.Module):
    """Args:
    dim: hidden size D.
    channels: of a key.
    config: keep; `router: position` matches neighbours alone, `frozen` by a random projection.
    """

    def __init__(self, dim: int, channels: int, config: RoutingConfig) -> None:
        super().__init__()
        self.config = config
        self.router: nn.Module | None = None
        assert config.router != "attention"  # the config refuses it
        if config.frozen or config.router == "position":
            self.router = make_score(dim, channels, config.router, config.router_hidden)
            self.router.requires_grad_(False)

    def forward(
        self, tokens: Tokens, key_TJC: Tensor, lengths: Sequence[int], context: Context
    ) -> Merged:
        """Match the tokens.

        Args:
            tokens: the residual stream after attention.
            key_TJC: of that attention, J heads, as queries see them.
            lengths: of the sequences, on the host, so that nothing waits for the device.
        """
        recomputing = context.recomputing
        with torch.autocast(key_TJC.device.type, enabled=False):  # fp32, as every router
            key_TC = reference.wide(key_TJC.detach()).mean(1)
            if self.router is not None:
                key_TC = self.router(reference.wide(tokens.x_TD.detach()), tokens.position_T)
            bounds = tokens.offsets_B1
            merged = context.recall("merged", lambda: self._merged(key_TC, bounds, lengths))
        if context.ledger is not None and not recomputing:
            pairs = sum((n + 1) // 2 * (n // 2) for n in lengths)
            score = flops_of(self, sum(lengths))  # of a control alone
            context.ledger.add("router", 2 * key_TC.size(1) * pairs + score, 0)
        return merged

    def _merged(self, key_TC: Tensor, offsets_B1: Tensor, lengths: Sequence[int]) -> Merged:
        similar_T, partner_T = match(key_TC, offsets_B1, max(lengths, default=0))
        keep = self.config.keep
        stay = [kept_of(n, keep) for n in lengths]
        return join(similar_T, partner_T, offsets_B1, stay, kept_of_each(offsets_B1, keep))


def kept_of(n: int, keep: float) -> int:
    """How many of n tokens are left; at least the first, and a half of the others."""
    return max(part_of(keep, n), n - max(n - 1, 0) // 2)


def kept_of_each(offsets_B1: Tensor, keep: float) -> Tensor:
    """(B,) the same of each sequence, on the device: a copy from the host could not be part of a
    CUDA graph."""
    length_B = offsets_B1.diff().long()
    return torch.maximum(part_of(keep, length_B), length_B - (length_B - 1).clamp(min=0) // 2)


def match(key_TC: Tensor, offsets_B1: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """For the tokens 2, 4, 6, ... of each sequence: which of the tokens 1, 3, 5, ... has the most
    similar key by the cosine, and how similar it is.

    Args:
        longest: tokens of the longest sequence.

    Returns:
        (T,) similarity, -inf for tokens that do not look or find none; (T,) int64 partners, the
        token itself for those.
    """
    T, B, H = key_TC.size(0), offsets_B1.numel() - 1, (longest + 1) // 2
    if T == 0:
        return key_TC.new_zeros(0), offsets_B1.new_zeros(0).long()
    start_B, length_B = offsets_B1[:-1].long(), offsets_B1.diff().long()
    sequence_T = reference.sequence_of(offsets_B1, T)
    token_T = torch.arange(T, device=key_TC.device)
    rank_T = token_T - start_B[sequence_T]
    unit_TC = F.normalize(key_TC, dim=-1)
    # one product for all sequences, each as wide as the longest
    cells = unit_TC.new_zeros(B * 2 * H, unit_TC.size(1))
    pairs_BH2C = cells.index_copy(0, sequence_T * 2 * H + rank_T, unit_TC).view(B, H, 2, -1)
    score_BHH = pairs_BH2C[:, :, 0] @ pairs_BH2C[:, :, 1].transpose(1, 2)
    odd_H = torch.arange(1, 2 * H, 2, device=key_TC.device)
    score_BHH = score_BHH.masked_fill(odd_H >= length_B[:, None, None], -math.inf)
    best_BH, odd_BH = score_BHH.max(-1)
    cell_T = sequence_T * H + rank_T // 2
    looks_T = (rank_T % 2 == 0) & (rank_T > 0)
    similar_T = best_BH.flatten()[cell_T].masked_fill(~looks_T, -math.inf)
    partner_T = start_B[sequence_T] + (2 * odd_BH.flatten()[cell_T] + 1)
    return similar_T, torch.where(similar_T > -math.inf, partner_T, token_T)


def join(
    similar_T: Tensor,
    partner_T: Tensor,
    offsets_B1: Tensor,
    stay: Sequence[int],
    stay_B: Tensor,
) -> Merged:
    """All but so many tokens of each sequence join their partners, the most similar ones.

    Args:
        stay, stay_B: how many do not, on the host and on the device.
    """
    kept = keep_counted(-similar_T, offsets_B1, stay, stay_B)
    row_T = kept.plan.row_TK[:, 0]
    slot_T = torch.where(row_T < 0, row_T[partner_T], row_T)
    plan = plan_from_ids(slot_T[:, None].int(), sum(kept.lengths))
    return Merged(replace(plan, out="group"), slot_T.long(), kept)


def unmerge(x_MD: Tensor, slot_T: Tensor) -> Tensor:
    """(T, D): every token gets what its slot has."""
    return x_MD[slot_T]
