"""The specification of a message between ranks: who serves a choice, and which row a token is."""

import torch
from torch import Tensor


def find_ranks(
    target_TK: Tensor, planned_TK: Tensor, tables: tuple[Tensor, Tensor, Tensor], first_token: int
) -> tuple[Tensor, Tensor]:
    """(T, K) int32 each: the rank that serves a choice, and its expert's slot there; -1: none.

    Args:
        planned_TK: of a Plan; a choice without a row goes nowhere.
        tables: copies_E, how many copies of each expert may serve, rank_EC and slot_EC of each.
        first_token: global index of token 0: copies of an expert share its tokens in turn.
    """
    copies_E, rank_EC, slot_EC = tables
    kept_TK = torch.where(planned_TK >= 0, target_TK, -1)
    expert_TK = kept_TK.clamp(min=0)
    token_T = torch.arange(kept_TK.size(0), device=kept_TK.device, dtype=torch.int64)
    copy_TK = (token_T[:, None] + first_token) % copies_E[expert_TK]
    rank_TK, slot_TK = rank_EC[expert_TK, copy_TK], slot_EC[expert_TK, copy_TK]
    return torch.where(kept_TK < 0, -1, rank_TK), torch.where(kept_TK < 0, -1, slot_TK)


def goes_to(rank_TK: Tensor, ranks: int) -> Tensor:
    """(T, W) bool: whether a token has a choice on a rank."""
    ranks_W = torch.arange(ranks, device=rank_TK.device, dtype=torch.int32)
    return (rank_TK[..., None] == ranks_W).any(1)


def lay_out(
    rank_TK: Tensor, slot_TK: Tensor, weight_TK: Tensor, bound_W: Tensor, rows: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A row for each (token, rank), in token order, from where the rank's slots begin.

    Args:
        bound_W: integers, slots of each rank, one rank's behind the other's.
        rows: their sum, R.

    Returns:
        src_R int32, the token of each row, -1: an empty slot; row_TW int32, the inverse, -1: none;
        packed_RP int32, the bits of the row's weights, then the slots of its choices: 0 and -1
        for those that live elsewhere; an int32 scalar, 1: a token found no slot.
    """
    W = bound_W.numel()
    goes_TW = goes_to(rank_TK, W)
    start_W = bound_W.cumsum(0) - bound_W
    position_TW = goes_TW.cumsum(0) - 1
    fits_TW = goes_TW & (position_TW < bound_W)
    row_TW = torch.where(fits_TW, start_W + position_TW, -1)
    flat = torch.arange(row_TW.numel(), device=row_TW.device, dtype=torch.int32)
    at = torch.where(fits_TW, row_TW, rows).flatten()  # what has no row goes behind the last one
    choice_R = flat.new_full((rows + 1,), -1).scatter_(0, at, flat)[:rows]
    src_R = torch.where(choice_R < 0, -1, choice_R // W)
    going_R = torch.where(choice_R < 0, -2, choice_R % W)  # -2: nobody is that rank
    here_RK = rank_TK[src_R] == going_R[:, None]
    id_RK = torch.where(here_RK, slot_TK[src_R], -1)
    weight_RK = weight_TK[src_R].masked_fill(~here_RK, 0.0)
    packed_RP = torch.cat([weight_RK.view(torch.int32), id_RK], 1)
    return src_R, row_TW.int(), packed_RP, (fits_TW != goes_TW).any().int()
