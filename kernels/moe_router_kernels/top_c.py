"""Triton: the best tokens of each segment, for each group. Specification: `reference.select_top_c`.

One program finds the score of the last token taken, by halving the range of a float's bits, which
order as the floats do; then it takes what lies above, and of its equals the earliest. No sort.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_router_kernels.launch import launch
from moe_router_kernels.sizes import ceil_div, next_power_of_2


@triton.jit
def _keys(score_ptr, token, last, group, G):  # type: ignore[no-untyped-def]
    """int64 that order as the scores; NaN, and what lies past the segment, below them all."""
    at = token.to(tl.int64) * G + group
    score = tl.load(score_ptr + at, mask=token < last, other=float("nan")).to(tl.float32)
    bits = (score + 0.0).to(tl.int32, bitcast=True)  # -0 + 0 is 0
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    lowest = tl.where(token < last, -2147483648, -4294967296).to(tl.int64)
    return tl.where(score == score, key, lowest)


@triton.jit
def _select_kernel(  # type: ignore[no-untyped-def]
    score_ptr, offsets_ptr, count_ptr, taken_ptr, G, BLOCK: tl.constexpr
):
    segment, group = tl.program_id(0), tl.program_id(1)
    first, last = tl.load(offsets_ptr + segment), tl.load(offsets_ptr + segment + 1)
    count = tl.minimum(tl.load(count_ptr + segment).to(tl.int32), last - first)
    low, high = tl.full((), -2147483648, tl.int64), tl.full((), 2147483647, tl.int64)
    for _ in range(32):  # the highest key that at least `count` tokens reach
        middle = low + (high - low + 1) // 2
        reached = tl.zeros((), tl.int32)
        for start in range(first, last, BLOCK):
            token = start + tl.arange(0, BLOCK)
            key = _keys(score_ptr, token, last, group, G)
            reached += tl.sum((key >= middle).to(tl.int32), 0)
        low = tl.where(reached >= count, middle, low)
        high = tl.where(reached >= count, high, middle - 1)
    above = tl.zeros((), tl.int32)
    for start in range(first, last, BLOCK):
        token = start + tl.arange(0, BLOCK)
        above += tl.sum((_keys(score_ptr, token, last, group, G) > low).to(tl.int32), 0)
    equal = tl.zeros((), tl.int32)
    for start in range(first, last, BLOCK):
        token = start + tl.arange(0, BLOCK)
        key = _keys(score_ptr, token, last, group, G)
        same = (key == low).to(tl.int32)
        earlier = equal + tl.cumsum(same, 0) - same
        taken = (key > low) | ((same > 0) & (earlier < count - above))
        at = token.to(tl.int64) * G + group
        tl.store(taken_ptr + at, taken.to(tl.int8), mask=token < last)
        equal += tl.sum(same, 0)


def select_top_c(score_TG: Tensor, offsets_S1: Tensor, count_S: Tensor) -> Tensor:
    """(T, G) bool."""
    (T, G), S = score_TG.shape, count_S.numel()
    taken = torch.zeros(T, G, dtype=torch.int8, device=score_TG.device)
    if T and G and S:
        block = min(4096, max(16, next_power_of_2(ceil_div(T, S))))
        launch(
            _select_kernel, (S, G),
            score_TG.contiguous(), offsets_S1.contiguous(), count_S.contiguous(), taken, G,
            BLOCK=block, num_warps=4 if block <= 1024 else 8,
        )  # fmt: skip
    return taken.view(torch.bool)
