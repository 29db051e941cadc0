"""Where choices go, and which row of the message each token is: integers, on the device."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_router.placement import Placement
from moe_router.routing.plan import plan_from_ids
from moe_router.types import Choice, Plan
from moe_router_kernels import reference_ranks as reference
from moe_router_kernels.choose import uses_triton


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
        tables = self.of(placement, choice.target_TK.device)
        inputs = (choice.target_TK, plan.row_TK, tables, first_token)
        if uses_triton("ranks", "auto", choice.target_TK.device):
            from moe_router_kernels import address

            return Where(*address.find_ranks(*inputs))
        return Where(*reference.find_ranks(*inputs))

    def of(self, placement: Placement, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
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
                rank_EC.contiguous(),
                slot_EC.contiguous(),
            )
        return self._made[key]


class Rows(NamedTuple):
    """The rows of a message, by rank of destination; a Plan with room behind each group.

    Attributes:
        rank_TK: int32, the rank that serves each choice.
        src_R: int32, the token of each row; -1: an empty slot.
        row_TW: int32, the inverse; -1: token t does not go to rank w.
        packed_RP: int32, what goes with a row: the bits of its weights, then its slots there.
        overflow: int32 scalar, not 0: a token found no slot.
    """

    rank_TK: Tensor
    src_R: Tensor
    row_TW: Tensor
    packed_RP: Tensor
    overflow: Tensor


def lay_out(where: Where, weight_TK: Tensor, bound_W: Tensor, rows: int) -> Rows:
    """A row for each (token, rank), in token order, from where the rank's slots begin.

    Args:
        bound_W: integers, slots of each rank, one rank's behind the other's.
        rows: their sum, R.
    """
    if uses_triton("ranks", "auto", bound_W.device):
        from moe_router_kernels import address

        found = address.lay_out(*where, weight_TK, bound_W, rows)
    else:
        found = reference.lay_out(*where, weight_TK, bound_W, rows)
    return Rows(where.rank_TK, *found)


def plan_within(id_NK: Tensor, groups: int, rows: int) -> tuple[Plan, Tensor | None]:
    """A Plan of at most `rows` rows, and whether that was too few: int32 scalar; None: never."""
    plan = plan_from_ids(id_NK, groups, rows=rows)
    if rows >= id_NK.numel():
        return plan, None
    row_NK = torch.where(plan.row_TK < rows, plan.row_TK, -1)
    offsets_G1 = plan.offsets_G1.clamp(max=rows)
    return Plan(plan.src_R, plan.choice_R, offsets_G1, row_NK), (plan.offsets_G1[-1] > rows).int()


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
    """(rows, D): `value` behind the tokens; those past `rows` are cut off. No copy if they fit."""
    if rows == x_TD.size(0):
        return x_TD
    return F.pad(x_TD[:rows], (0, 0, 0, max(rows - x_TD.size(0), 0)), value=value)
