"""Triton: each token's rows summed by weight, in one pass over them."""

import triton
import triton.language as tl
from torch import Tensor


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
    block_d = min(1024, triton.next_power_of_2(max(D, 1)))
    block_t = max(1, 1024 // block_d)
    if T and D:
        _combine_kernel[(triton.cdiv(T, block_t), triton.cdiv(D, block_d))](
            y_RD, out if weight_TK is None else weight_TK, row_TK, out, T, D,
            K=K, WEIGHTED=weight_TK is not None, BLOCK_T=block_t, BLOCK_D=block_d, num_warps=4,
        )  # fmt: skip
    return out
