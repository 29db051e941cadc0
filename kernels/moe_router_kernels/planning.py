"""Triton: rows for choices. Specification: `reference.plan` and `reference.rank_in_group`.

A choice's row is where its group begins, plus its rank in the group: choices of earlier blocks
(`scan`) and earlier choices of its own block. No sort, no atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_router_kernels.fused_gate import Gated

Plan = tuple[Tensor, Tensor, Tensor, Tensor]


@triton.jit
def _rank_kernel(  # type: ignore[no-untyped-def]
    target_ptr, order_ptr, rank_ptr, load_ptr, R, G, blocks,
    BLOCK: tl.constexpr, G_PAD: tl.constexpr, ORDERED: tl.constexpr,
):  # fmt: skip
    """Earlier choices of the block in the same group, in the order served."""
    block = tl.program_id(0)
    served = block * BLOCK + tl.arange(0, BLOCK)
    live = served < R
    choice = served
    if ORDERED:
        choice = tl.load(order_ptr + served, mask=live, other=0)
    target = tl.load(target_ptr + choice, mask=live, other=-1)
    group = tl.arange(0, G_PAD)
    here = (group[None, :] == target[:, None]) & (group < G)[None, :]
    chosen = here.to(tl.int32)
    before = tl.cumsum(chosen, 0) - chosen
    tl.store(rank_ptr + choice, tl.sum(tl.where(here, before, 0), 1), mask=live)
    load_at = group.to(tl.int64) * blocks + block
    tl.store(load_ptr + load_at, tl.sum(chosen, 0), mask=group < G)


@triton.jit
def _scan_kernel(  # type: ignore[no-untyped-def]
    load_ptr, before_ptr, total_ptr, share_ptr, shares_ptr, z_ptr, zs_ptr, blocks,
    BLOCK_N: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0)
    running = tl.zeros((), tl.int32)
    share = tl.zeros((), tl.float32)
    z = tl.zeros((), tl.float32)
    for first in range(0, blocks, BLOCK_N):
        block = first + tl.arange(0, BLOCK_N)
        at = group.to(tl.int64) * blocks + block
        load = tl.load(load_ptr + at, mask=block < blocks, other=0)
        tl.store(before_ptr + at, running + tl.cumsum(load, 0) - load, mask=block < blocks)
        running += tl.sum(load, 0)
        if SUMS:
            share += tl.sum(tl.load(share_ptr + at, mask=block < blocks, other=0.0), 0)
            z += tl.sum(tl.load(z_ptr + block, mask=block < blocks, other=0.0), 0)
    tl.store(total_ptr + group, running)
    if SUMS:
        tl.store(shares_ptr + group, share)
        if group == 0:
            tl.store(zs_ptr, z)


@triton.jit
def _place_kernel(  # type: ignore[no-untyped-def]
    target_ptr, rank_ptr, before_ptr, total_ptr, src_ptr, choice_ptr, offsets_ptr, row_ptr,
    R, E, blocks,
    K: tl.constexpr, E_PAD: tl.constexpr, PER_BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    group = tl.arange(0, E_PAD)
    total = tl.load(total_ptr + group, mask=group < E, other=0)
    end = tl.cumsum(total, 0)
    if tl.program_id(0) == 0:
        tl.store(offsets_ptr + group + 1, end, mask=group < E)
        tl.store(offsets_ptr + group, tl.zeros((E_PAD,), tl.int32), mask=group == 0)
    choice = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    live = choice < R
    target = tl.load(target_ptr + choice, mask=live, other=-1)
    rank = tl.load(rank_ptr + choice, mask=live, other=0)
    real = (target >= 0) & (target < E)
    mine = tl.where(real, target, 0)
    before_at = mine.to(tl.int64) * blocks + choice // PER_BLOCK
    before = tl.load(before_ptr + before_at, mask=real, other=0)
    row = tl.gather(end - total, mine, 0) + before + rank
    tl.store(row_ptr + choice, tl.where(real, row, -1), mask=live)
    tl.store(src_ptr + row, choice // K, mask=real)
    tl.store(choice_ptr + row, choice, mask=real)
    # rows past the end, if choices are missing
    unused = live & (choice >= tl.sum(total, 0))
    none = tl.full((BLOCK_R,), -1, tl.int32)
    tl.store(src_ptr + choice, none, mask=unused)
    tl.store(choice_ptr + choice, none, mask=unused)


@triton.jit
def _drop_kernel(  # type: ignore[no-untyped-def]
    target_ptr, order_ptr, rank_ptr, before_ptr, kept_ptr, R, G, blocks, capacity,
    PER_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    served = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = served < R
    choice = tl.load(order_ptr + served, mask=live, other=0)
    target = tl.load(target_ptr + choice, mask=live, other=-1)
    real = live & (target >= 0) & (target < G)
    before_at = target.to(tl.int64) * blocks + served // PER_BLOCK
    before = tl.load(before_ptr + before_at, mask=real, other=0)
    rank = before + tl.load(rank_ptr + choice, mask=live, other=0)
    tl.store(kept_ptr + choice, tl.where(real & (rank < capacity), target, -1), mask=live)


def _scan(load_GN: Tensor, gated: Gated | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(G, N) choices before each block, (G,) in all; with `gated` its sums, else nothing."""
    G, blocks = load_GN.shape
    before_GN, total_G = torch.empty_like(load_GN), load_GN.new_empty(G)
    sums = gated is not None and gated.z_N.numel() == blocks
    partial = (gated.share_GN, gated.z_N) if gated is not None else (load_GN, load_GN)
    share_G = torch.zeros(G if sums else 0, device=load_GN.device)
    z = torch.zeros(1 if sums else 0, device=load_GN.device)
    if G:
        _scan_kernel[(G,)](
            load_GN, before_GN, total_G, partial[0], share_G, partial[1], z, blocks,
            BLOCK_N=min(2048, triton.next_power_of_2(max(blocks, 1))), SUMS=sums,
        )  # fmt: skip
    return before_GN, total_G, share_G, z


def _place(
    target_TK: Tensor, rank_TK: Tensor, before_GN: Tensor, total_G: Tensor, groups: int, per: int
) -> Plan:
    K, R = target_TK.size(1), target_TK.numel()
    src_R, choice_R = target_TK.new_empty(R), target_TK.new_empty(R)
    offsets_G1, row_TK = target_TK.new_empty(groups + 1), torch.empty_like(target_TK)
    # without tokens, someone must still write the offsets
    _place_kernel[(max(1, triton.cdiv(R, 1024)),)](
        target_TK, rank_TK, before_GN, total_G, src_R, choice_R, offsets_G1, row_TK,
        R, groups, before_GN.size(1),
        K=max(K, 1), E_PAD=triton.next_power_of_2(max(groups, 1)), PER_BLOCK=per, BLOCK_R=1024,
    )  # fmt: skip
    return src_R, choice_R, offsets_G1, row_TK


def finish(gated: Gated, experts: int) -> tuple[Tensor, Tensor, Tensor, Plan]:
    """(G,) load of what the gate decided, the sums of the losses, and the Plan over the experts."""
    before_GN, load_G, share_G, z = _scan(gated.load_GN, gated)
    per = gated.block * gated.raw_TK.size(1)
    plan = _place(gated.raw_TK, gated.rank_TK, before_GN, load_G, experts, per)
    return load_G, share_G, z, plan


def _rank(target_TK: Tensor, groups: int, order_R: Tensor | None) -> tuple[Tensor, Tensor, int]:
    R, pad = target_TK.numel(), triton.next_power_of_2(max(groups, 1))
    block = max(16, min(256, 8192 // pad))
    blocks = triton.cdiv(R, block)
    rank_TK, load_GN = torch.empty_like(target_TK), target_TK.new_empty(groups, blocks)
    if R:
        _rank_kernel[(blocks,)](
            target_TK, target_TK if order_R is None else order_R, rank_TK, load_GN,
            R, groups, blocks, BLOCK=block, G_PAD=pad, ORDERED=order_R is not None,
        )  # fmt: skip
    return rank_TK, load_GN, block


def plan_from_ids(target_TK: Tensor, groups: int) -> Plan:
    """`reference.plan`, in three launches. target_TK is int32 and contiguous."""
    rank_TK, load_GN, block = _rank(target_TK, groups, None)
    before_GN, total_G, _, _ = _scan(load_GN)
    return _place(target_TK, rank_TK, before_GN, total_G, groups, block)


def drop(target_TK: Tensor, groups: int, order_R: Tensor, capacity: int) -> Tensor:
    """The choices of rank below `capacity` in their group, the others -1, in three launches.

    Args:
        order_R: int32 permutation of the flat choices, first served first.
    """
    rank_TK, load_GN, block = _rank(target_TK, groups, order_R)
    before_GN, _, _, _ = _scan(load_GN)
    kept_TK, R = torch.empty_like(target_TK), target_TK.numel()
    if R:
        _drop_kernel[(triton.cdiv(R, 1024),)](
            target_TK, order_R, rank_TK, before_GN, kept_TK, R, groups, before_GN.size(1),
            capacity, PER_BLOCK=block, BLOCK=1024,
        )  # fmt: skip
    return kept_TK
