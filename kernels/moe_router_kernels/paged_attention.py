"""Triton: keys and values into the pages of a cache, and attention of single tokens to them.
Specification: `reference_pages`.

Storing turns queries and keys by their positions on the way: one launch in the place of a dozen.
Attention takes a page at a time. Where there are few queries, several programs share the pages of
one, and a second launch puts together what they found; each part has its own maximum, so the sum is
exact whatever the split. Lengths and pages are read on the device, so one CUDA graph serves texts
of any length.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_router_kernels.launch import launch
from moe_router_kernels.sizes import ceil_div, next_power_of_2


@triton.jit
def _turned(x_ptr, at, cos, sin, C: tl.constexpr):  # type: ignore[no-untyped-def]
    """One head of one token, fp32."""
    channel = tl.arange(0, C)
    x = tl.load(x_ptr + at + channel).to(tl.float32)
    other = tl.load(x_ptr + at + (channel + C // 2) % C).to(tl.float32)
    return x * cos + other * sin


@triton.jit(do_not_specialize=["stride_table"])  # the table grows: no compiling anew for its width
def _store_kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, pages_ptr, table_ptr, row_ptr, slot_ptr,
    q_out_ptr, k_out_ptr, H, J, stride_table, stride_values,
    C: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channel = tl.arange(0, C)
    cos = tl.load(cos_ptr + token * C + channel)
    sin = tl.load(sin_ptr + token * C + channel)
    if head < H:
        at = (token * H + head) * C
        turned = _turned(q_ptr, at, cos, sin, C)
        tl.store(q_out_ptr + at + channel, turned.to(q_out_ptr.dtype.element_ty))
    else:
        j = head - H
        at = (token * J + j) * C
        key = _turned(k_ptr, at, cos, sin, C).to(k_out_ptr.dtype.element_ty)
        tl.store(k_out_ptr + at + channel, key)
        row, slot = tl.load(row_ptr + token), tl.load(slot_ptr + token)
        page = tl.load(table_ptr + row.to(tl.int64) * stride_table + slot // PAGE).to(tl.int64)
        to = ((page * J + j) * PAGE + slot % PAGE) * C + channel
        tl.store(pages_ptr + to, key)
        tl.store(pages_ptr + stride_values + to, tl.load(v_ptr + at + channel))


@triton.jit(do_not_specialize=["stride_table"])
def _attend_kernel(  # type: ignore[no-untyped-def]
    q_ptr, pages_ptr, table_ptr, row_ptr, seen_ptr, out_ptr,
    sum_ptr,  # (T, H, SPLITS, C) fp32, and best and total (T, H, SPLITS), if SPLITS > 1
    best_ptr, total_ptr, H, J, stride_table, stride_values, scale,
    C: tl.constexpr, PAGE: tl.constexpr, HEADS: tl.constexpr, SPLITS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    token, j, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    seen = tl.load(seen_ptr + token)
    table_ptr += tl.load(row_ptr + token).to(tl.int64) * stride_table
    pages = tl.cdiv(seen, PAGE)
    each = tl.cdiv(pages, SPLITS)
    first = split * each
    last = tl.minimum(first + each, pages)
    heads = H // J
    member, channel, inside = tl.arange(0, HEADS), tl.arange(0, C), tl.arange(0, PAGE)
    mine = member < heads
    head = token * H + j * heads + member
    at = head[:, None] * C + channel[None, :]
    q = tl.load(q_ptr + at, mask=mine[:, None], other=0.0)
    best = tl.full((HEADS,), float("-inf"), tl.float32)
    total = tl.zeros((HEADS,), tl.float32)
    acc = tl.zeros((HEADS, C), tl.float32)
    for n in range(first, last):
        page = tl.load(table_ptr + n).to(tl.int64)
        from_ = ((page * J + j) * PAGE + inside[:, None]) * C + channel[None, :]
        there = n * PAGE + inside < seen  # what lies past it may be NaN
        k = tl.load(pages_ptr + from_, mask=there[:, None], other=0.0)
        v = tl.load(pages_ptr + stride_values + from_, mask=there[:, None], other=0.0)
        score = tl.dot(q, k.T, input_precision=PRECISION) * scale
        score = tl.where(there[None, :], score, float("-inf"))
        higher = tl.maximum(best, tl.max(score, 1))  # finite: each page holds a slot that is seen
        power = tl.exp(score - higher[:, None])
        fade = tl.exp(best - higher)
        total = total * fade + tl.sum(power, 1)
        acc = tl.dot(power.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)
        best = higher
    if SPLITS == 1:
        acc = acc / tl.where(total > 0, total, 1.0)[:, None]
        tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=mine[:, None])
    else:
        part = head * SPLITS + split
        sum_at = part[:, None] * C + channel[None, :]
        tl.store(sum_ptr + sum_at, acc, mask=mine[:, None])
        tl.store(best_ptr + part, best, mask=mine)
        tl.store(total_ptr + part, total, mask=mine)


@triton.jit
def _join_kernel(  # type: ignore[no-untyped-def]
    sum_ptr, best_ptr, total_ptr, out_ptr, C: tl.constexpr, SPLITS: tl.constexpr
):
    head = tl.program_id(0).to(tl.int64)
    split, channel = tl.arange(0, SPLITS), tl.arange(0, C)
    part = head * SPLITS + split
    total = tl.load(total_ptr + part)
    best = tl.load(best_ptr + part)
    some = total > 0
    fade = tl.where(some, tl.exp(best - tl.max(best, 0)), 0.0)
    at = part[:, None] * C + channel[None, :]
    parts = tl.load(sum_ptr + at, mask=some[:, None], other=0.0)
    whole = tl.sum(total * fade, 0)
    out = tl.sum(parts * fade[:, None], 0) / tl.where(whole > 0, whole, 1.0)
    tl.store(out_ptr + head * C + channel, out.to(out_ptr.dtype.element_ty))


def store(
    q_THC: Tensor, k_TJC: Tensor, v_TJC: Tensor, cos_T1C: Tensor, sin_T1C: Tensor,
    pages_2NJSC: Tensor, table_BM: Tensor, row_T: Tensor, slot_T: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Turned queries and keys; the keys and the values are in their pages."""
    (T, H, C), J = q_THC.shape, k_TJC.size(1)
    q_THC, k_TJC, v_TJC, cos_T1C, sin_T1C, row_T, slot_T = (
        x.contiguous() for x in (q_THC, k_TJC, v_TJC, cos_T1C, sin_T1C, row_T, slot_T)
    )
    q_out, k_out = torch.empty_like(q_THC), torch.empty_like(k_TJC)
    if T:
        launch(
            _store_kernel, (T, H + J),
            q_THC, k_TJC, v_TJC, cos_T1C, sin_T1C, pages_2NJSC, table_BM, row_T, slot_T,
            q_out, k_out, H, J, table_BM.stride(0), pages_2NJSC.stride(0),
            C=C, PAGE=pages_2NJSC.size(3), num_warps=1,
        )  # fmt: skip
    return q_out, k_out


def splits(tokens: int, kv_heads: int, pages: int) -> int:
    """Programs that share the pages of a query: as many as fill a GPU of 132 multiprocessors twice,
    a power of two, for the second launch is a sum over them."""
    wanted = min(64, pages, ceil_div(2 * 132, tokens * kv_heads))
    power: int = next_power_of_2(max(wanted, 1))
    return power if power <= wanted else power // 2


def attend(
    q_THC: Tensor, pages_2NJSC: Tensor, table_BM: Tensor, row_T: Tensor, seen_T: Tensor
) -> Tensor:
    """(T, H, C): each query's attention to the first `seen_T` slots of its sequence."""
    (T, H, C), J, PAGE = q_THC.shape, pages_2NJSC.size(2), pages_2NJSC.size(3)
    q_THC, row_T, seen_T = (x.contiguous() for x in (q_THC, row_T, seen_T))
    out = torch.empty_like(q_THC)
    if T == 0:
        return out
    n = splits(T, J, table_BM.size(1))
    wide = q_THC.dtype == torch.float32
    shared = T * H * n if n > 1 else 0
    parts = torch.empty(shared, C, device=q_THC.device, dtype=torch.float32)
    best, total = (torch.empty(shared, device=q_THC.device, dtype=torch.float32) for _ in range(2))
    launch(
        _attend_kernel, (T, J, n),
        q_THC, pages_2NJSC, table_BM, row_T, seen_T, out, parts, best, total,
        H, J, table_BM.stride(0), pages_2NJSC.stride(0), C**-0.5,
        C=C, PAGE=PAGE, HEADS=max(16, next_power_of_2(H // J)), SPLITS=n,
        PRECISION="ieee" if wide else "tf32", num_warps=4, num_stages=2 if wide else 3,
    )  # fmt: skip
    if n > 1:
        launch(_join_kernel, (T * H,), parts, best, total, out, C=C, SPLITS=n, num_warps=4)
    return out
