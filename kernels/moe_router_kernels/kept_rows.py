"""Triton: a linear layer for those of a few tokens that a flag on the device names. Specification:
`reference.linear_of_kept`.

With few tokens a layer takes as long as reading its weights, and where no token is kept a program
reads none: so one CUDA graph serves every decision, and a skipped layer costs next to nothing. Kept
tokens stand together in tiles; which they are, each program counts for itself.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_router_kernels.launch import launch
from moe_router_kernels.sizes import ceil_div, next_power_of_2


@triton.jit
def _linear_kernel(  # type: ignore[no-untyped-def]
    x_ptr, kept_ptr, w_ptr, out_ptr, T, N, K, stride_x,
    T_PAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.arange(0, T_PAD)
    kept = tl.load(kept_ptr + token, mask=token < T, other=0).to(tl.int32)
    place = tl.cumsum(kept, 0) - 1
    count = tl.sum(kept, 0)
    inside = column < N
    if tile == 0:  # the others are 0
        at = token.to(tl.int64)[:, None] * N + column[None, :]
        none = ((kept == 0) & (token < T))[:, None] & inside[None, :]
        tl.store(out_ptr + at, tl.zeros((T_PAD, BLOCK_N), out_ptr.dtype.element_ty), mask=none)
    if tile * BLOCK_M < count:
        row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        here = (place[None, :] == row[:, None]) & (kept[None, :] > 0)
        src = tl.sum(tl.where(here, token[None, :], 0), 1)
        live = row < count
        step = tl.arange(0, BLOCK_K)
        x_at = x_ptr + src.to(tl.int64)[:, None] * stride_x
        w_at = w_ptr + column.to(tl.int64)[:, None] * K  # int64: N * K passes 2**31
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            within = k + step < K
            x = tl.load(x_at + (k + step)[None, :], mask=live[:, None] & within[None, :], other=0.0)
            w_in = inside[:, None] & within[None, :]
            w = tl.load(w_at + (k + step)[None, :], mask=w_in, other=0.0)
            acc = tl.dot(x, w.T, acc, input_precision=PRECISION)
        to = src.to(tl.int64)[:, None] * N + column[None, :]
        value = acc.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + to, value, mask=live[:, None] & inside[None, :])


def linear_of_kept(x_TK: Tensor, weight_NK: Tensor, kept_T: Tensor) -> Tensor:
    """(T, N): x times the weight, transposed, where kept; 0 elsewhere.

    Args:
        x_TK: a few hundred tokens at most, unit stride over K; weight's dtype.
        kept_T: bool.
    """
    (T, K), N = x_TK.shape, weight_NK.size(0)
    out = x_TK.new_empty(T, N)
    if T == 0 or N == 0:
        return out
    wide = x_TK.dtype == torch.float32
    # a tile reads its weights again: few tokens make one tile, and leave room for more in flight
    block_m = 16 if T <= 16 else 64
    block_n, block_k = (32, 64) if wide else (16, 256) if block_m == 16 else (32, 128)
    launch(
        _linear_kernel, (ceil_div(T, block_m), ceil_div(N, block_n)),
        x_TK, kept_T.contiguous().view(torch.int8), weight_NK, out, T, N, K, x_TK.stride(0),
        T_PAD=max(16, next_power_of_2(T)), BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k,
        PRECISION="ieee" if wide else "tf32", num_warps=4, num_stages=2 if wide else 4,
    )  # fmt: skip
    return out
