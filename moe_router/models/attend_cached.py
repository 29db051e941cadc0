"""Attention of new tokens to a cache, on bare tensors. H query heads, J key and value heads, C
channels of a head, S slots of a sequence, Q queries of it.

Single tokens go to a kernel that reads pages as they lie; a prompt from its beginning needs no
cache; more of a text sees a copy of its pages.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_router.models.attend import attend_packed, flash, runs_flash
from moe_router.models.packing import Packing
from moe_router_kernels import reference_pages
from moe_router_kernels.paged_op import attend_pages


def attend_cached(
    q_THC: Tensor,
    k_TJC: Tensor,
    v_TJC: Tensor,
    pages_2NJSC: Tensor,
    table_BM: Tensor,
    slot_T: Tensor,
    packing: Packing,
    held: Sequence[int],
) -> Tensor:
    """Each new token attends to the slots of its sequence up to its own.

    Args:
        k_TJC, v_TJC: of the new tokens; the cache has them already.
        pages_2NJSC, table_BM: the cache, see `reference_pages`.
        slot_T: (T,) int64, the slot of each new token.
        held: slots of each sequence before them.

    Returns:
        (T, H, C) of q's dtype.
    """
    if packing.tokens == 0:
        return q_THC
    y_THC = torch.empty_like(q_THC)
    for way, part, whole in _ways(packing, held):
        q_RHC, slot_R = q_THC[part.token_R], slot_T[part.token_R]
        if way == "one":
            y_RHC = attend_pages(q_RHC, pages_2NJSC, table_BM, part.row_B, slot_R + 1)
        elif way == "new":
            y_RHC = attend_packed(q_RHC, k_TJC[part.token_R], v_TJC[part.token_R], part.packing)
        elif runs_flash(q_THC):
            row_S = part.row_B[whole.sequence_T]
            cache = reference_pages.gather(pages_2NJSC, table_BM, row_S, whole.rank_T)
            y_RHC = flash(True)(q_RHC, *cache, part.packing, whole)
        else:
            table = table_BM[part.row_B, : -(-whole.longest // pages_2NJSC.size(3))]
            seen_B = slot_R[part.packing.offsets_B1[1:].long() - 1] + 1
            cache = reference_pages.read(pages_2NJSC, table, seen_B)
            y_RHC = _attend_grid(q_RHC, *cache, slot_R, part.packing)
        y_THC[part.token_R] = y_RHC
    return y_THC


@dataclass(frozen=True, slots=True)
class Part:
    """Some sequences of a pass."""

    packing: Packing
    row_B: Tensor
    token_R: Tensor | slice

    @classmethod
    def of(cls, rows: Sequence[int], packing: Packing) -> "Part":
        row_B = torch.tensor(rows, device=packing.device)
        if len(rows) == packing.sequences:
            return cls(packing, row_B, slice(None))
        lengths = [packing.lengths[row] for row in rows]
        starts = [0, *accumulate(packing.lengths)]
        token_R = torch.cat([torch.arange(starts[row], starts[row + 1]) for row in rows])
        inside = Packing(torch.tensor([0, *accumulate(lengths)]), packing.device)
        return cls(inside, row_B, token_R.to(packing.device))


def _ways(packing: Packing, held: Sequence[int]) -> list[tuple[str, Part, Packing]]:
    """How sequences attend, which ones, and their whole texts; once for layers that hold alike."""
    key = tuple(held)
    if key not in packing.ways:
        packing.ways[key] = ways = []
        for (way, _), rows in _alike(packing.lengths, held).items():
            ends = [0, *accumulate(held[row] + packing.lengths[row] for row in rows)]
            whole = Packing(torch.tensor(ends), packing.device)
            ways.append((way, Part.of(rows, packing), whole))
    found: list[tuple[str, Part, Packing]] = packing.ways[key]
    return found


def _alike(lengths: Sequence[int], held: Sequence[int]) -> dict[tuple[str, int], list[int]]:
    """The sequences that have new tokens, by how they are computed: a token alone; a prompt from
    its beginning; more of a text, by the power of two up to which there is, for a long one beside
    short ones would make every row as wide as itself."""
    alike = defaultdict(list)
    for row, (n, old) in enumerate(zip(lengths, held, strict=True)):
        if n == 1:
            alike["one", 0].append(row)
        elif n:
            alike[("more", (n - 1).bit_length()) if old else ("new", 0)].append(row)
    return alike


def _attend_grid(
    q_THC: Tensor, k_BJSC: Tensor, v_BJSC: Tensor, slot_T: Tensor, packing: Packing
) -> Tensor:
    """All sequences in one call, each as wide as the longest."""
    B, Q, J = packing.sequences, packing.longest, k_BJSC.size(1)
    _, H, C = q_THC.shape
    cell_T = packing.sequence_T * Q + packing.rank_T
    q_BQHC = q_THC.new_zeros(B * Q, H, C).index_copy(0, cell_T, q_THC).view(B, Q, H, C)
    last_BQ = slot_T.new_zeros(B * Q).index_copy(0, cell_T, slot_T).view(B, Q)
    # the H / J query heads of a key head become rows of one matrix: the cache is never repeated
    q_BJXC = q_BQHC.view(B, Q, J, H // J, C).permute(0, 2, 3, 1, 4).reshape(B, J, -1, C)
    slot_S = torch.arange(k_BJSC.size(2), device=slot_T.device)
    seen_BQS = slot_S <= last_BQ[..., None]
    seen_B1XS = seen_BQS[:, None].expand(B, H // J, Q, -1).reshape(B, 1, H // J * Q, -1)
    y_BJXC = F.scaled_dot_product_attention(q_BJXC, k_BJSC, v_BJSC, attn_mask=seen_B1XS)
    y_BQHC = y_BJXC.view(B, J, H // J, Q, C).permute(0, 3, 1, 2, 4).reshape(B * Q, H, C)
    return y_BQHC[cell_T]
