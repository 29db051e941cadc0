"""Triton: means of blocks of tokens, and the best key blocks of each query block. Specification:
`reference_attention.block_means`, `choose_blocks` and `route_blocks`.

The choice finds the score of the last block taken by halving the range of a float's bits, which
order as the floats do; then it takes what lies above, and of its equals the earliest. No sort.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_router_kernels.launch import launch
from moe_router_kernels.sizes import next_power_of_2


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
        launch(
            _means_kernel, (N, kv_heads),
            x_THd.contiguous(), first_N, last_N, mean_NJd, kv_heads,
            D=d, D_PAD=next_power_of_2(d), BLOCK=next_power_of_2(block),
            GROUP=H // kv_heads,
        )  # fmt: skip
    return mean_NJd


@triton.jit
def _summaries_kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, first_ptr, last_ptr, query_ptr, key_ptr, N, J, scale,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    n, j = tl.program_id(0), tl.program_id(1)
    first, last = tl.load(first_ptr + n), tl.load(last_ptr + n)
    token, channel = first + tl.arange(0, BLOCK), tl.arange(0, D_PAD)
    inside = channel < D
    keep = (token < last)[:, None] & inside[None, :]
    row = token.to(tl.int64) * J + j
    k = tl.load(k_ptr + row[:, None] * D + channel[None, :], mask=keep, other=0.0)
    out = (j.to(tl.int64) * N + n) * D + channel
    tl.store(key_ptr + out, tl.sum(k.to(tl.float32), 0) / (last - first), mask=inside)
    total = tl.zeros((D_PAD,), tl.float32)
    if CAUSAL:  # the first token asks
        head = tl.arange(0, GROUP_PAD)
        at = ((first.to(tl.int64) * J + j) * GROUP + head)[:, None] * D + channel[None, :]
        q = tl.load(q_ptr + at, mask=(head < GROUP)[:, None] & inside[None, :], other=0.0)
        total += tl.sum(q.to(tl.float32), 0) / GROUP
    else:
        for one in range(0, GROUP):
            at = (row * GROUP + one)[:, None] * D + channel[None, :]
            total += tl.sum(tl.load(q_ptr + at, mask=keep, other=0.0).to(tl.float32), 0)
        total = total / (GROUP * (last - first))
    tl.store(query_ptr + out, total * scale, mask=inside)


@triton.jit
def _choose_kernel(  # type: ignore[no-untyped-def]
    score_ptr, own_ptr, low_ptr, high_ptr, first_ptr, last_ptr, target_ptr, count_ptr,
    stride_m, stride_j, J, K, WINDOW, BLOCK, N_PAD: tl.constexpr, CAUSAL: tl.constexpr,
    COUNT: tl.constexpr,
):  # fmt: skip
    m, j = tl.program_id(0), tl.program_id(1)
    unit = m.to(tl.int64) * J + j
    low, high = tl.load(low_ptr + m), tl.load(high_ptr + m)
    key_block = tl.arange(0, N_PAD)
    inside = (key_block >= low) & (key_block < high)
    row_ptr = score_ptr + m.to(tl.int64) * stride_m + j.to(tl.int64) * stride_j
    score = tl.load(row_ptr + key_block, mask=inside, other=0.0).to(tl.float32)
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
    list_ptr = target_ptr + unit * K
    tl.store(list_ptr + place, key_block, mask=taken > 0)
    tl.store(list_ptr + key_block, -1, mask=(key_block >= count) & (key_block < K))
    if COUNT:
        masked = 1  # its own block
        if not CAUSAL:  # a last block with a gap
            size = tl.load(last_ptr + high - 1) - tl.load(first_ptr + high - 1)
            ended = tl.sum(tl.where(key_block == high - 1, taken, 0), 0)
            masked = tl.where(size < BLOCK, ended, 0)
        tl.store(count_ptr + 2 * unit, count - masked)
        tl.store(count_ptr + 2 * unit + 1, count)


def choose_blocks(
    score_MJN: Tensor, own_M: Tensor, low_M: Tensor, high_M: Tensor, k: int, window: int
) -> Tensor:
    """(M, J, k) int32."""
    return _chosen(score_MJN, (own_M, low_M, high_M), k, window)[0]


def route_blocks(
    q_THd: Tensor, k_TJd: Tensor, first_N: Tensor, last_N: Tensor, own_N: Tensor, low_N: Tensor,
    high_N: Tensor, block: int, k: int, window: int, causal: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(N, J, k) int32 and (N, J, 2) int32: one launch for means, a product, one for the choice."""
    N, (_, H, d), J = first_N.numel(), q_THd.shape, k_TJd.size(1)
    query_JNd, key_JNd = torch.empty(2, J, N, d, device=q_THd.device)
    if N and J:
        group = H // J
        launch(
            _summaries_kernel, (N, J),
            q_THd.contiguous(), k_TJd.contiguous(), first_N, last_N, query_JNd, key_JNd, N, J,
            d**-0.5, D=d, D_PAD=next_power_of_2(d), BLOCK=next_power_of_2(block),
            GROUP=group, GROUP_PAD=next_power_of_2(group), CAUSAL=causal,
        )  # fmt: skip
    score_NJN = torch.bmm(query_JNd, key_JNd.transpose(1, 2)).transpose(0, 1)
    bounds = (own_N, low_N, high_N, first_N, last_N)
    return _chosen(score_NJN, bounds, k, window, block, causal)


def _chosen(
    score_MJN: Tensor, bounds: tuple[Tensor, ...], k: int, window: int, block: int = 0,
    causal: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """bounds: own, low, high; with the first and last token of each block counts are made too."""
    M, J, N = score_MJN.shape
    score_MJN = score_MJN if score_MJN.stride(2) == 1 else score_MJN.contiguous()
    counts = len(bounds) == 5
    target_MJK = torch.empty(M, J, k, dtype=torch.int32, device=score_MJN.device)
    count_MJ2 = target_MJK.new_empty(M, J, 2) if counts else target_MJK
    if M and N and J and k:
        padded = next_power_of_2(max(N, k))
        launch(
            _choose_kernel, (M, J),
            score_MJN, *bounds, *(() if counts else bounds[:2]), target_MJK, count_MJ2,
            score_MJN.stride(0), score_MJN.stride(1), J, k, window, block,
            N_PAD=padded, CAUSAL=causal, COUNT=counts,
            num_warps=1 if padded <= 128 else 4 if padded <= 2048 else 8,
        )  # fmt: skip
    else:
        target_MJK.fill_(-1)
        count_MJ2.zero_()
    return target_MJK, count_MJ2
