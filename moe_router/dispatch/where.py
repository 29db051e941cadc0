"""Where choices go, and which row of the message each token is: integers, on the device."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_router.placement import Placement
from moe_router.routing.plan import plan_from_ids
from moe_router.types import Choice, Plan


class Where(NamedTuple):
    """Attributes:
    rank_TK, slot_TK: int32, the rank that serves a choice and its expert's slot there; -1: none.
    """

    rank_TK: Tensor
    slot_TK: Tensor


class Tables:
    """A placement as tensors, made once for each device.

    A choice goes to the copy of its expert on the token's own rank, if there is one; else to copy
    number (global token index mod copies), so that copies share what comes from elsewhere.

    Args:
        rank: of the tokens.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._made: dict[tuple[Placement, torch.device], tuple[Tensor, Tensor, Tensor]] = {}

    def find(self, choice: Choice, plan: Plan, placement: Placement, first_token: int) -> Where:
        """Where each choice that has a row goes.

        Args:
            first_token: global index of token 0.
        """
        kept_TK = torch.where(plan.row_TK >= 0, choice.target_TK, -1)
        copies_E, rank_EC, slot_EC = self._tables(placement, kept_TK.device)
        expert_TK = kept_TK.clamp(min=0)
        token_T = torch.arange(kept_TK.size(0), device=kept_TK.device, dtype=torch.int64)
        copy_TK = (token_T[:, None] + first_token) % copies_E[expert_TK]
        rank_TK, slot_TK = rank_EC[expert_TK, copy_TK], slot_EC[expert_TK, copy_TK]
        return Where(*(torch.where(kept_TK < 0, -1, found) for found in (rank_TK, slot_TK)))

    def _tables(self, placement: Placement, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """How many copies of each expert may serve this rank, and their ranks and slots."""
        key = (placement, device)
        if key not in self._made:
            copies = placement.copies()
            serving = [[c for c in of if c[0] == self._rank] or of for of in copies]
            C = max(map(len, serving), default=1)
            padded = [of + [(-1, -1)] * (C - len(of)) for of in serving]
            rank_EC, slot_EC = torch.tensor(padded, dtype=torch.int32, device=device).unbind(-1)
            self._made[key] = (
                torch.tensor([len(of) for of in serving], device=device),
                rank_EC,
                slot_EC,
            )
        return self._made[key]


def goes_to(rank_TK: Tensor, ranks: int) -> Tensor:
    """(T, W) bool: whether a token has a choice on a rank."""
    ranks_W = torch.arange(ranks, device=rank_TK.device, dtype=torch.int32)
    return (rank_TK[..., None] == ranks_W).any(1)


class Rows(NamedTuple):
    """The rows of a message, by rank of destination; a Plan with room behind each group.

    Attributes:
        src_R, choice_R: int32, the token of each row, and t * W + w; -1: an empty slot.
        row_TW: int32, the inverse; -1: token t does not go to rank w.
        overflow: bool scalar: a token found no slot.
    """

    src_R: Tensor
    choice_R: Tensor
    row_TW: Tensor
    overflow: Tensor


def lay_out(goes_TW: Tensor, bound_W: Tensor, rows: int) -> Rows:
    """A row for each (token, rank), in token order, from where the rank's slots begin.

    Args:
        goes_TW: bool.
        bound_W: slots of each rank, one rank's behind the other's.
        rows: their sum, R.
    """
    W = goes_TW.size(1)
    start_W = bound_W.cumsum(0) - bound_W
    position_TW = goes_TW.cumsum(0) - 1
    fits_TW = goes_TW & (position_TW < bound_W)
    row_TW = torch.where(fits_TW, start_W + position_TW, -1)
    flat = torch.arange(row_TW.numel(), device=row_TW.device, dtype=torch.int32)
    at = torch.where(fits_TW, row_TW, rows).flatten()  # what has no row goes behind the last one
    choice_R = flat.new_full((rows + 1,), -1).scatter_(0, at, flat)[:rows]
    src_R = torch.where(choice_R < 0, -1, choice_R // W)
    return Rows(src_R, choice_R, row_TW.int(), (fits_TW != goes_TW).any())


def plan_within(id_NK: Tensor, groups: int, rows: int) -> tuple[Plan, Tensor]:
    """A Plan of at most `rows` rows, and whether that was too few (bool scalar)."""
    plan = plan_from_ids(id_NK, groups, rows=rows)
    row_NK = torch.where(plan.row_TK < rows, plan.row_TK, -1)
    offsets_G1 = plan.offsets_G1.clamp(max=rows)
    return Plan(plan.src_R, plan.choice_R, offsets_G1, row_NK), plan.offsets_G1[-1] > rows


def slots_of_rank(tokens: int, placement: Placement, K: int, factor: float) -> list[int]:
    """Length W: the rows a rank may send to each other: `factor` times what even routing sends.

    Args:
        tokens: of the sender.
        K: choices of a token, each of another expert.
    """
    E = placement.experts
    everything = max(math.comb(E, K), 1)
    slots = []
    for held in map(len, placement.experts_of_rank):
        share = 1 - math.comb(E - held, K) / everything  # of tokens with a choice on that rank
        slots.append(min(tokens, math.ceil(factor * tokens * share)))
    return slots


def rows_of_experts(
    tokens: int, placement: Placement, rank: int, K: int, received: int, factor: float
) -> int:
    """The rows of all experts of a rank: `factor` times the mean over the ranks' tokens.

    Args:
        tokens: of one source.
        received: N, rows that may arrive; they bound it too.
    """
    held = len(placement.experts_of_rank[rank])
    mean = placement.ranks * tokens * K * held / max(placement.experts, 1)
    return min(received * min(K, held), math.ceil(factor * mean))


def pad(x_TD: Tensor, rows: int, value: float = 0.0) -> Tensor:
    """(rows, D): `value` behind the tokens; those past `rows` are cut off."""
    return F.pad(x_TD[:rows], (0, 0, 0, max(rows - x_TD.size(0), 0)), value=value)
