"""Triton: which tile of rows belongs to which group: a table on the device, so that nothing waits
for counts."""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from moe_router_kernels.launch import launch
from moe_router_kernels.sizes import ceil_div, next_power_of_2


@triton.jit
def _tile_table_kernel(  # type: ignore[no-untyped-def]
    offsets_ptr, group_ptr, row_ptr, used_ptr, G, bound, BLOCK_M: tl.constexpr,
    G_PAD: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    group = tl.arange(0, G_PAD)
    first = tl.load(offsets_ptr + group, mask=group < G, other=0)
    last = tl.load(offsets_ptr + group + 1, mask=group < G, other=0)
    tiles = (last - first + BLOCK_M - 1) // BLOCK_M
    end = tl.cumsum(tiles, 0)
    tile = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mine = tl.sum((end[None, :] <= tile[:, None]).to(tl.int32), 1)
    here = group[None, :] == mine[:, None]
    start = first - (end - tiles) * BLOCK_M
    row = tl.sum(tl.where(here, start[None, :], 0), 1) + tile * BLOCK_M
    tl.store(group_ptr + tile, mine, mask=tile < bound)
    tl.store(row_ptr + tile, row, mask=tile < bound)
    if tl.program_id(0) == 0:
        tl.store(used_ptr, tl.sum(tiles, 0))


@dataclass(frozen=True, slots=True)
class Rows:
    """R rows sorted by group, cut into tiles; made once per Plan and tile height.

    Attributes:
        rows: R, a bound.
        offsets_G1: int32, rows of each group.
        group_N, row_N: int32, its group and its first row; N is a bound.
        used: (1,) int32, how many there are.
        m: height of a tile.
    """

    rows: int
    offsets_G1: Tensor
    group_N: Tensor
    row_N: Tensor
    used: Tensor
    m: int


def cut(offsets_G1: Tensor, rows: int, m: int) -> Rows:
    """Cut R rows into tiles of at most m rows of one group."""
    G = offsets_G1.numel() - 1
    bound = ceil_div(rows, m) + G
    group_N, row_N, used = (offsets_G1.new_empty(n) for n in (bound, bound, 1))
    launch(
        _tile_table_kernel, (ceil_div(bound, 64),),
        offsets_G1, group_N, row_N, used, G, bound,
        BLOCK_M=m, G_PAD=next_power_of_2(G), BLOCK_N=64, num_warps=4,
    )  # fmt: skip
    return Rows(rows, offsets_G1, group_N, row_N, used, m)
