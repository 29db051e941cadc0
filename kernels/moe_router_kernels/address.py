"""Triton: which rank serves a choice, and which row of a message each token is. No sort, no host.

Specification: `reference_ranks`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_router_kernels.launch import launch
from moe_router_kernels.sizes import ceil_div, next_power_of_2


@triton.jit
def _find_kernel(  # type: ignore[no-untyped-def]
    target_ptr, planned_ptr, copies_ptr, rank_of_ptr, slot_of_ptr, rank_ptr, slot_ptr, R, C,
    first_token, K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    choice = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = choice < R
    expert = tl.load(target_ptr + choice, mask=live, other=-1)
    kept = (tl.load(planned_ptr + choice, mask=live, other=-1) >= 0) & (expert >= 0)
    copies = tl.load(copies_ptr + expert, mask=kept, other=1)
    copy = (choice // K + first_token) % copies  # int64, as copies is
    at = expert * C + copy
    tl.store(rank_ptr + choice, tl.load(rank_of_ptr + at, mask=kept, other=-1), mask=live)
    tl.store(slot_ptr + choice, tl.load(slot_of_ptr + at, mask=kept, other=-1), mask=live)


def find_ranks(
    target_TK: Tensor, planned_TK: Tensor, tables: tuple[Tensor, Tensor, Tensor], first_token: int
) -> tuple[Tensor, Tensor]:
    """`reference_ranks.find_ranks` in one launch."""
    copies_E, rank_EC, slot_EC = tables
    rank_TK, slot_TK = torch.empty_like(target_TK), torch.empty_like(target_TK)
    R = target_TK.numel()
    if R:
        launch(
            _find_kernel, (ceil_div(R, 1024),),
            target_TK, planned_TK, copies_E, rank_EC, slot_EC, rank_TK, slot_TK, R,
            rank_EC.size(1), first_token, K=target_TK.size(1), BLOCK=1024,
        )  # fmt: skip
    return rank_TK, slot_TK


@triton.jit
def _choices_for(  # type: ignore[no-untyped-def]
    rank_ptr, first, T, peer, K: tl.constexpr, K_PAD: tl.constexpr, BLOCK_T: tl.constexpr
):
    """Which choices of a block of tokens the peer serves."""
    token, k = first + tl.arange(0, BLOCK_T), tl.arange(0, K_PAD)
    inside = (token < T)[:, None] & (k < K)[None, :]
    return tl.load(rank_ptr + token[:, None] * K + k[None, :], mask=inside, other=-1) == peer


@triton.jit
def _lay_out_kernel(  # type: ignore[no-untyped-def]
    rank_ptr, slot_ptr, bits_ptr, bound_ptr, src_ptr, row_ptr, packed_ptr, told_ptr, T,
    W: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr, WORDS: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    """The rows of one block of tokens to one peer; each program counts the tokens before it."""
    peer, first = tl.program_id(0), tl.program_id(1) * BLOCK_T
    start = peer * 0
    for w in tl.static_range(W):
        start += tl.where(w < peer, tl.load(bound_ptr + w), 0).to(tl.int32)
    bound = tl.load(bound_ptr + peer).to(tl.int32)
    earlier = tl.zeros((BLOCK_T,), tl.int32)
    for before in range(0, first, BLOCK_T):
        here = _choices_for(rank_ptr, before, T, peer, K, K_PAD, BLOCK_T)
        earlier += tl.max(here.to(tl.int32), 1)
    here = _choices_for(rank_ptr, first, T, peer, K, K_PAD, BLOCK_T)
    goes = tl.max(here.to(tl.int32), 1)
    position = tl.sum(earlier, 0) + tl.cumsum(goes, 0) - goes
    fits = (goes > 0) & (position < bound)
    token, k = first + tl.arange(0, BLOCK_T), tl.arange(0, K_PAD)
    row = start + position
    tl.store(row_ptr + token * W + peer, tl.where(fits, row, -1), mask=token < T)
    tl.store(src_ptr + row, token, mask=fits)
    P: tl.constexpr = K * WORDS + K
    choice = token[:, None] * K + k[None, :]
    written = fits[:, None] & (k < K)[None, :]
    at = row.to(tl.int64)[:, None] * P + k[None, :] * WORDS
    for word in tl.static_range(WORDS):
        bits = tl.load(bits_ptr + choice * WORDS + word, mask=here, other=0)
        tl.store(packed_ptr + at + word, bits, mask=written)
    slot = tl.load(slot_ptr + choice, mask=here, other=-1)
    id_at = row.to(tl.int64)[:, None] * P + K * WORDS + k[None, :]
    tl.store(packed_ptr + id_at, slot, mask=written)
    count = tl.sum(earlier, 0) + tl.sum(goes, 0)
    if count > bound:
        tl.store(told_ptr, 1)
    if first + BLOCK_T >= T:  # the last program empties the slots that are left
        while count < bound:
            empty = count + tl.arange(0, BLOCK_T)
            tl.store(src_ptr + start + empty, -1, mask=empty < bound)
            id_at = (start + empty).to(tl.int64)[:, None] * P + K * WORDS + k[None, :]
            unused = (empty < bound)[:, None] & (k < K)[None, :]
            tl.store(packed_ptr + id_at, -1, mask=unused)
            for word in tl.static_range(WORDS):
                at = (start + empty).to(tl.int64)[:, None] * P + k[None, :] * WORDS + word
                tl.store(packed_ptr + at, 0, mask=unused)
            count += BLOCK_T


def lay_out(
    rank_TK: Tensor, slot_TK: Tensor, weight_TK: Tensor, bound_W: Tensor, rows: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`reference_ranks.lay_out` in one launch."""
    (T, K), W = rank_TK.shape, bound_W.numel()
    bits = weight_TK.contiguous().view(torch.int32)
    words = bits.size(1) // max(K, 1)
    src_R, row_TW = rank_TK.new_empty(rows), rank_TK.new_empty(T, W)
    packed_RP = rank_TK.new_empty(rows, bits.size(1) + K)
    told = rank_TK.new_zeros(())
    block_t = 512  # few, so that the last one soon has counted the tokens before it
    launch(
        _lay_out_kernel, (W, max(1, ceil_div(T, block_t))),
        rank_TK, slot_TK, bits, bound_W, src_R, row_TW, packed_RP, told, T, W=W, K=K,
        K_PAD=next_power_of_2(max(K, 1)), WORDS=words, BLOCK_T=block_t,
        num_warps=8,
    )  # fmt: skip
    return src_R, row_TW, packed_RP, told
