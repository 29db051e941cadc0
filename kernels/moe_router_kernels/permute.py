"""Triton: tokens to their rows, and each token's rows summed by weight; one pass over each."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_router_kernels.launch import launch
from moe_router_kernels.sizes import ceil_div, next_power_of_2


@triton.jit
def _move_kernel(  # type: ignore[no-untyped-def]
    x_ptr, row_ptr, rows_ptr, T, D, stride_x, K: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (token < T)[:, None] & (column < D)[None, :]
    at = token.to(tl.int64)[:, None] * stride_x + column[None, :]
    value = tl.load(x_ptr + at, mask=inside)
    for k in tl.static_range(K):
        row = tl.load(row_ptr + token.to(tl.int64) * K + k, mask=token < T, other=-1)
        to = row.to(tl.int64)[:, None] * D + column[None, :]
        tl.store(rows_ptr + to, value, mask=inside & (row >= 0)[:, None])


def move_rows(x_TD: Tensor, row_TK: Tensor, rows: int | None = None) -> Tensor:
    """(R, D): each token, read once, copied to its rows; rows that no choice has: unspecified.

    Args:
        x_TD: unit stride over D.
        rows: R; default T * K.
    """
    (T, K), D = row_TK.shape, x_TD.size(1)
    rows_RD = x_TD.new_empty(T * K if rows is None else rows, D)
    block_d = min(256, next_power_of_2(max(D, 1)))
    block_t = max(1, 2048 // block_d)
    if rows_RD.numel():
        launch(
            _move_kernel, (ceil_div(T, block_t), ceil_div(D, block_d)),
            x_TD, row_TK, rows_RD, T, D, x_TD.stride(0), K=K, BLOCK_T=block_t, BLOCK_D=block_d,
        )  # fmt: skip
    return rows_RD


@triton.jit
def _combine_kernel(  # type: ignore[no-untyped-def]
    y_ptr, weight_ptr, row_ptr, out_ptr, T, D, K: tl.constexpr, WEIGHTED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (token < T)[:, None] & (column < D)[None, :]
    acc = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for k in tl.static_range(K):  # in order of k: the same sum every time
        flat = token.to(tl.int64) * K + k
        row = tl.load(row_ptr + flat, mask=token < T, other=-1)
        at = row.to(tl.int64)[:, None] * D + column[None, :]
        y = tl.load(y_ptr + at, mask=inside & (row >= 0)[:, None], other=0.0).to(tl.float32)
        if WEIGHTED:
            y = y * tl.load(weight_ptr + flat, mask=token < T, other=0.0)[:, None]
        acc += y
    out_at = token.to(tl.int64)[:, None] * D + column[None, :]
    tl.store(out_ptr + out_at, acc.to(out_ptr.dtype.element_ty), mask=inside)


def combine_rows(y_RD: Tensor, row_TK: Tensor, weight_TK: Tensor | None = None) -> Tensor:
    """(T, D): each token's rows, weighted, summed in fp32 in order of k; -1 adds nothing."""
    (T, K), D = row_TK.shape, y_RD.size(1)
    out = y_RD.new_empty(T, D)
    block_d = min(1024, next_power_of_2(max(D, 1)))
    block_t = max(1, 1024 // block_d)
    if T and D:
        launch(
            _combine_kernel, (ceil_div(T, block_t), ceil_div(D, block_d)),
            y_RD, out if weight_TK is None else weight_TK, row_TK, out, T, D,
            K=K, WEIGHTED=weight_TK is not None, BLOCK_T=block_t, BLOCK_D=block_d, num_warps=4,
        )  # fmt: skip
    return out


@triton.jit
def _combine_backward_kernel(  # type: ignore[no-untyped-def]
    grad_ptr, y_ptr, weight_ptr, src_ptr, choice_ptr, out_ptr, dot_ptr, R, D,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    src = tl.load(src_ptr + row, mask=row < R, other=-1)
    choice = tl.load(choice_ptr + row, mask=row < R, other=-1)
    live = src >= 0  # what lies past the last row may be NaN
    weight = tl.load(weight_ptr + choice, mask=live, other=0.0)
    dot = tl.zeros((BLOCK_R,), tl.float32)
    for first in range(0, D, BLOCK_D):
        column = first + tl.arange(0, BLOCK_D)
        inside = (column < D)[None, :]
        keep = live[:, None] & inside
        from_at = src.to(tl.int64)[:, None] * D + column[None, :]
        at = row.to(tl.int64)[:, None] * D + column[None, :]
        grad = tl.load(grad_ptr + from_at, mask=keep, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + at, mask=keep, other=0.0).to(tl.float32)
        dot += tl.sum(grad * y, 1)
        out = (grad * weight[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + at, out, mask=(row < R)[:, None] & inside)
    tl.store(dot_ptr + choice, dot, mask=live)


def combine_backward(
    grad_TD: Tensor, y_RD: Tensor, weight_TK: Tensor, src_R: Tensor, choice_R: Tensor,
    row_TK: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`reference.combine_backward`: (R, D) for the rows, (T, K) for the weights."""
    R, D = y_RD.shape
    out, dot_TK = torch.empty_like(y_RD), torch.zeros_like(weight_TK)
    block_d = min(1024, next_power_of_2(max(D, 1)))
    block_r = max(1, 1024 // block_d)
    if R:
        launch(
            _combine_backward_kernel, (ceil_div(R, block_r),),
            grad_TD, y_RD, weight_TK, src_R, choice_R, out, dot_TK, R, D,
            BLOCK_R=block_r, BLOCK_D=block_d, num_warps=4,
        )  # fmt: skip
    return out, dot_TK
