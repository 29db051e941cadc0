"""Triton: means of blocks of tokens, and the best key blocks of each query block. Specification:
`reference_attention.block_means` and `choose_blocks`.

The choice finds the score of the last block taken by halving the range of a float's bits, which
order as the floats do; then it takes what lies above, and of its equals the earliest. No sort.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _means_kernel(  # type: ignore[no-untyped-def]
    x_ptr, first_ptr, last_ptr, mean_ptr, J,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    n, j = tl.program_id(0), tl.program_id(1)
    first, last = tl.load(first_ptr + n), tl.load(last_ptr + n)
    token, channel = first + tl.arange(0, BLOCK), tl.arange(0, D_PAD)
    keep = (token < last)[:, None] & (channel < D)[None, :]
    total = tl.zeros((D_PAD,), tl.float32)
    for head in range(0, GROUP):
        # int64: 131072 tokens of 128 heads of 128 channels
        row = (token.to(tl.int64) * J + j) * GROUP + head
        x = tl.load(x_ptr + row[:, None] * D + channel[None, :], mask=keep, other=0.0)
        total += tl.sum(x.to(tl.float32), 0)
    mean = total / (GROUP * (last - first))
    tl.store(mean_ptr + (n.to(tl.int64) * J + j) * D + channel, mean, mask=channel < D)


def block_means(
    x_THd: Tensor, first_N: Tensor, last_N: Tensor, kv_heads: int, block: int
) -> Tensor:
    """(N, J, d) fp32."""
    N, (_, H, d) = first_N.numel(), x_THd.shape
    mean_NJd = torch.empty(N, kv_heads, d, device=x_THd.device)
    if N and H:
        _means_kernel[(N, kv_heads)](
            x_THd.contiguous(), first_N, last_N, mean_NJd, kv_heads,
            D=d, D_PAD=triton.next_power_of_2(d), BLOCK=triton.next_power_of_2(block),
            GROUP=H // kv_heads,
        )  # fmt: skip
    return mean_NJd


@triton.jit
def _choose_kernel(  # type: ignore[no-untyped-def]
    score_ptr, own_ptr, low_ptr, high_ptr, target_ptr, N, J, K, WINDOW, N_PAD: tl.constexpr
):
    m, j = tl.program_id(0), tl.program_id(1)
    unit = m.to(tl.int64) * J + j
    low, high = tl.load(low_ptr + m), tl.load(high_ptr + m)
    key_block = tl.arange(0, N_PAD)
    inside = (key_block >= low) & (key_block < high)
    score = tl.load(score_ptr + unit * N + key_block, mask=inside, other=0.0)
    bits = (score + 0.0).to(tl.int32, bitcast=True)  # -0 + 0 is 0
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    key = tl.where(score == score, key, -2147483648)  # NaN below every number
    far = tl.abs(key_block - tl.load(own_ptr + m))
    key = tl.where(far <= WINDOW, 2147483647, key)
    key = tl.where(inside, key, -4294967296)
    count = tl.minimum(K, high - low)
    least, most = tl.full((), -2147483648, tl.int64), tl.full((), 2147483647, tl.int64)
    for _ in range(32):  # the highest key that at least `count` blocks reach
        middle = least + (most - least + 1) // 2
        reached = tl.sum((key >= middle).to(tl.int32), 0) >= count
        least = tl.where(reached, middle, least)
        most = tl.where(reached, most, middle - 1)
    above, same = (key > least).to(tl.int32), (key == least).to(tl.int32)
    room = count - tl.sum(above, 0)
    taken = above + tl.where(tl.cumsum(same, 0) <= room, same, 0)
    place = tl.cumsum(taken, 0) - 1
    tl.store(target_ptr + unit * K + place, key_block, mask=taken > 0)


def choose_blocks(
    score_MJN: Tensor, own_M: Tensor, low_M: Tensor, high_M: Tensor, k: int, window: int
) -> Tensor:
    """(M, J, k) int32."""
    M, J, N = score_MJN.shape
    target_MJK = torch.full((M, J, k), -1, dtype=torch.int32, device=score_MJN.device)
    if M and N and J and k:
        padded = triton.next_power_of_2(N)
        _choose_kernel[(M, J)](
            score_MJN.contiguous(), own_M, low_M, high_M, target_MJK, N, J, k, window,
            N_PAD=padded, num_warps=1 if padded <= 128 else 4 if padded <= 2048 else 8,
        )  # fmt: skip
    return target_MJK
