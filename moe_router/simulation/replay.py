"""The choices of one layer, replayed on ranks that hold experts in a given way: counts alone."""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_router.dispatch.cost_model import Load
from moe_router.dispatch.where import Tables, slots_of_rank
from moe_router.placement import Placement
from moe_router_kernels.reference_ranks import find_ranks, goes_to


@dataclass(frozen=True, slots=True)
class Replayed:
    """One layer in one micro-step.

    Attributes:
        load: rows between ranks.
        choices_W: rows of the experts of each rank.
        dropped: choices that found no room in their expert.
    """

    load: Load
    choices_W: Tensor
    dropped: int

    @property
    def overflows(self) -> bool:
        """Rows find no slot: a static transport would take the step again by host splits."""
        return bool((self.load.rows_WW > self.load.slots_WW).any())


def replay(
    target_WTK: Tensor, placement: Placement, factor: float, capacity: int | None
) -> Replayed:
    """Args:
    target_WTK: experts of every rank's tokens, -1: none.
    factor: of the static slots, see `Padded`.
    capacity: rows that an expert takes from one rank, the earlier tokens first; None: all.
    """
    W, T, K = target_WTK.shape
    rows, choices, dropped = [], [], 0
    for rank, target_TK in enumerate(target_WTK.int()):
        if capacity is not None:
            kept_TK = _within(target_TK, capacity)
            dropped += int((kept_TK != target_TK).sum())
            target_TK = kept_TK
        tables = Tables(rank).of(placement, target_TK.device)
        rank_TK, _ = find_ranks(target_TK, target_TK, tables, rank * T)
        rows.append(goes_to(rank_TK, W).sum(0))
        choices.append(torch.bincount(rank_TK[rank_TK >= 0], minlength=W))
    slots_W = torch.tensor(slots_of_rank(T, placement, K, factor), dtype=torch.float64)
    load = Load(torch.stack(rows).double(), slots_W.expand(W, W))
    return Replayed(load, torch.stack(choices).sum(0).double(), dropped)


def _within(target_TK: Tensor, capacity: int) -> Tensor:
    """Choices past the first `capacity` of their expert become -1."""
    flat = target_TK.flatten().long()
    order = flat.argsort(stable=True)
    sorted_ = flat[order]
    first = torch.searchsorted(sorted_, sorted_)
    place = torch.empty_like(flat)
    place[order] = torch.arange(len(flat)) - first
    return target_TK.masked_fill((place >= capacity).view_as(target_TK) & (target_TK >= 0), -1)
