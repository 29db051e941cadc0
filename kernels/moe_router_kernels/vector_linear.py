"""Triton: linear layers of one token, up to three that read the same one in a launch.
Specification: `reference.linears`.

One token takes as long as reading the weights, if enough of them are on their way at once: a
program multiplies a few rows of a matrix with the token, and there are thousands of programs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_router_kernels.launch import launch
from moe_router_kernels.sizes import ceil_div, next_power_of_2

_ROWS, _SPAN, _WARPS = 2, 2048, 8  # measured on an H100 (docs/log.md)


@triton.jit
def _vector_kernel(  # type: ignore[no-untyped-def]
    x_ptr, a_ptr, b_ptr, c_ptr, out_ptr, A, B, C, K,
    ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """ROWS numbers of one of the products, which stand behind each other in `out`."""
    tile = tl.program_id(0)
    w_ptr, rows, start = a_ptr, A, 0 * A
    behind_a = tile - tl.cdiv(A, ROWS)
    behind_b = behind_a - tl.cdiv(B, ROWS)
    if behind_a >= 0:
        w_ptr, rows, start, tile = b_ptr, B, A, behind_a
    if behind_b >= 0:
        w_ptr, rows, start, tile = c_ptr, C, A + B, behind_b
    n = tile * ROWS + tl.arange(0, ROWS)
    w_at = w_ptr + n.to(tl.int64)[:, None] * K
    total = tl.zeros((ROWS, BLOCK_K), tl.float32)
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        inside = (n < rows)[:, None] & (k < K)[None, :]
        x = tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
        total += tl.load(w_at + k[None, :], mask=inside, other=0.0).to(tl.float32) * x
    out = tl.sum(total, 1).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + start + n, out, mask=n < rows)


def linears(x_1K: Tensor, weights: list[Tensor], dtype: torch.dtype) -> Tensor:
    """(1, the sum of all N): x times each (N, K) weight, transposed; all contiguous, one dtype."""
    K, sizes = x_1K.size(1), [w.size(0) for w in weights]
    out = x_1K.new_empty(1, sum(sizes), dtype=dtype)
    none = 3 - len(weights)
    tiles = sum(ceil_div(n, _ROWS) for n in sizes)
    if tiles:
        launch(
            _vector_kernel, (tiles,),
            x_1K, *weights, *[weights[0]] * none, out, *sizes, *[0] * none, K,
            ROWS=_ROWS, BLOCK_K=min(_SPAN, next_power_of_2(K)), num_warps=_WARPS,
        )  # fmt: skip
    return out
