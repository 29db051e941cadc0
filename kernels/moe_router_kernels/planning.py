"""Triton: rows for choices. Specification: `reference.plan` and `reference.rank_in_group`.

A choice's row is where its group begins, plus its rank in the group: choices of earlier blocks
(`scan`) and earlier choices of its own block. No sort, no atomics.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_router_kernels.fused_gate import Gated
from moe_router_kernels.launch import launch
from moe_router_kernels.sizes import ceil_div, next_power_of_2

FEW = 16384  # choices times groups of a Plan that one program makes, in 64 registers a thread
PLACED = 256  # choices of a program: latency counts, so many small ones
Plan = tuple[Tensor, Tensor, Tensor, Tensor]
Sums = tuple[Tensor, Tensor, Tensor]  # load_G, share_G and z of the gate; empty if not asked for


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
def _store_rows(  # type: ignore[no-untyped-def]
    choice, live, target, row, used, src_ptr, choice_ptr, row_ptr, E, K: tl.constexpr
):
    """A choice's row, and the way back; -1 in the rows that no choice has, which are the last."""
    real = live & (target >= 0) & (target < E)
    tl.store(row_ptr + choice, tl.where(real, row, -1), mask=live)
    tl.store(src_ptr + row, choice // K, mask=real)
    tl.store(choice_ptr + row, choice, mask=real)
    unused = live & (choice >= used)
    tl.store(src_ptr + choice, -1, mask=unused)
    tl.store(choice_ptr + choice, -1, mask=unused)


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
    used = tl.sum(total, 0)
    _store_rows(choice, live, target, row, used, src_ptr, choice_ptr, row_ptr, E, K)


@triton.jit
def _scan_and_place_kernel(  # type: ignore[no-untyped-def]
    target_ptr, rank_ptr, load_ptr, total_ptr, share_ptr, shares_ptr, z_ptr, zs_ptr,
    src_ptr, choice_ptr, offsets_ptr, row_ptr, R, G, E, blocks,
    K: tl.constexpr, G_PAD: tl.constexpr, N_PAD: tl.constexpr, PER_BLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """Both at once: each program reads all counts, which are few."""
    mine = tl.program_id(0)
    group, block = tl.arange(0, G_PAD), tl.arange(0, N_PAD)
    at = group[:, None] * blocks + block[None, :]
    inside = (group < G)[:, None] & (block < blocks)[None, :]
    load = tl.load(load_ptr + at, mask=inside, other=0)
    count = tl.sum(load, 1)
    total = tl.where(group < E, count, 0)
    end = tl.cumsum(total, 0)
    before = tl.sum(tl.where(block[None, :] < mine, load, 0), 1)
    if mine == 0:
        tl.store(total_ptr + group, count, mask=group < G)
        tl.store(offsets_ptr + group + 1, end, mask=group < E)
        tl.store(offsets_ptr + group, tl.zeros((G_PAD,), tl.int32), mask=group == 0)
        if SUMS:
            share = tl.load(share_ptr + at, mask=inside, other=0.0)
            tl.store(shares_ptr + group, tl.sum(share, 1), mask=group < G)
            tl.store(zs_ptr, tl.sum(tl.load(z_ptr + block, mask=block < blocks, other=0.0), 0))
    inner = tl.arange(0, BLOCK_R)
    choice = mine * PER_BLOCK + inner
    live = (inner < PER_BLOCK) & (choice < R)
    target = tl.load(target_ptr + choice, mask=live, other=-1)
    rank = tl.load(rank_ptr + choice, mask=live, other=0)
    whose = tl.where((target >= 0) & (target < E), target, 0)
    row = tl.gather(end - total + before, whose, 0) + rank
    used = tl.sum(total, 0)
    _store_rows(choice, live, target, row, used, src_ptr, choice_ptr, row_ptr, E, K)


@triton.jit
def _few_kernel(  # type: ignore[no-untyped-def]
    target_ptr, src_ptr, choice_ptr, offsets_ptr, row_ptr, R, G,
    K: tl.constexpr, BLOCK: tl.constexpr, G_PAD: tl.constexpr,
):  # fmt: skip
    """All of it in one program."""
    choice, group = tl.arange(0, BLOCK), tl.arange(0, G_PAD)
    live = choice < R
    target = tl.load(target_ptr + choice, mask=live, other=-1)
    here = (group[None, :] == target[:, None]) & (group < G)[None, :]
    chosen = here.to(tl.int32)
    total = tl.sum(chosen, 0)
    end = tl.cumsum(total, 0)
    row = tl.cumsum(chosen, 0) - chosen + (end - total)[None, :]
    tl.store(offsets_ptr + group + 1, end, mask=group < G)
    tl.store(offsets_ptr + group, tl.zeros((G_PAD,), tl.int32), mask=group == 0)
    row = tl.sum(tl.where(here, row, 0), 1)
    used = tl.sum(total, 0)
    _store_rows(choice, live, target, row, used, src_ptr, choice_ptr, row_ptr, G, K)


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


@dataclass(frozen=True, slots=True)
class Counts:
    """What blocks of choices have counted.

    Attributes:
        load_GN: int32, choices of each group by block.
        per: choices of a block.
        share_GN, z_N: fp32, partial sums of the losses, if `sums`.
    """

    load_GN: Tensor
    per: int
    share_GN: Tensor
    z_N: Tensor
    sums: bool = False

    @classmethod
    def of_ids(cls, load_GN: Tensor, per: int) -> "Counts":
        return cls(load_GN, per, load_GN, load_GN)

    def totals(self) -> Sums:
        """Unwritten."""
        G, floats = self.load_GN.size(0), self.share_GN.new_empty
        return self.load_GN.new_empty(G), floats(G * self.sums), floats(int(self.sums))


def _scan(counts: Counts) -> tuple[Tensor, Sums]:
    """(G, N) choices before each block; and the sums over the blocks."""
    load_GN, (load_G, share_G, z) = counts.load_GN, counts.totals()
    (G, blocks), before_GN = load_GN.shape, torch.empty_like(load_GN)
    if G:
        launch(
            _scan_kernel, (G,),
            load_GN, before_GN, load_G, counts.share_GN, share_G, counts.z_N, z, blocks,
            BLOCK_N=min(2048, next_power_of_2(max(blocks, 1))), SUMS=counts.sums,
        )  # fmt: skip
    return before_GN, (load_G, share_G, z)


def _unwritten(target_TK: Tensor, groups: int) -> Plan:
    R, ints = target_TK.numel(), target_TK.new_empty
    return ints(R), ints(R), ints(groups + 1), torch.empty_like(target_TK)


def _finish(target_TK: Tensor, rank_TK: Tensor, counts: Counts, groups: int) -> tuple[Sums, Plan]:
    """Sums over the blocks, and the Plan over the first `groups` groups."""
    K, R, (G, blocks) = target_TK.size(1), target_TK.numel(), counts.load_GN.shape
    plan = _unwritten(target_TK, groups)
    pads = next_power_of_2(max(G, 1)), next_power_of_2(max(blocks, 1))
    if blocks and pads[0] * pads[1] <= 8192:
        sums = counts.totals()
        launch(
            _scan_and_place_kernel, (blocks,),
            target_TK, rank_TK, counts.load_GN, sums[0], counts.share_GN, sums[1], counts.z_N,
            sums[2], *plan, R, G, groups, blocks,
            K=max(K, 1), G_PAD=pads[0], N_PAD=pads[1], PER_BLOCK=counts.per,
            BLOCK_R=next_power_of_2(counts.per), SUMS=counts.sums, num_warps=8,
        )  # fmt: skip
        return sums, plan
    before_GN, sums = _scan(counts)
    # without tokens, someone must still write the offsets
    launch(
        _place_kernel, (max(1, ceil_div(R, PLACED)),),
        target_TK, rank_TK, before_GN, sums[0], *plan, R, groups, blocks,
        K=max(K, 1), E_PAD=next_power_of_2(max(groups, 1)), PER_BLOCK=counts.per,
        BLOCK_R=PLACED,
    )  # fmt: skip
    return sums, plan


def finish(gated: Gated, experts: int) -> tuple[Tensor, Tensor, Tensor, Plan]:
    """(G,) load of what the gate decided, the sums of the losses, and the Plan over the experts."""
    if gated.plan is not None:
        return gated.load_GN.flatten(), gated.share_GN.flatten(), gated.z_N, gated.plan
    per = gated.block * gated.raw_TK.size(1)
    counts = Counts(gated.load_GN, per, gated.share_GN, gated.z_N, gated.sums)
    (load_G, share_G, z), plan = _finish(gated.raw_TK, gated.rank_TK, counts, experts)
    return load_G, share_G, z, plan


def _rank(target_TK: Tensor, groups: int, order_R: Tensor | None) -> tuple[Tensor, Counts]:
    R, pad = target_TK.numel(), next_power_of_2(max(groups, 1))
    block = max(16, min(256, 8192 // pad))
    blocks = ceil_div(R, block)
    rank_TK, load_GN = torch.empty_like(target_TK), target_TK.new_empty(groups, blocks)
    if R:
        launch(
            _rank_kernel, (blocks,),
            target_TK, target_TK if order_R is None else order_R, rank_TK, load_GN,
            R, groups, blocks, BLOCK=block, G_PAD=pad, ORDERED=order_R is not None,
        )  # fmt: skip
    return rank_TK, Counts.of_ids(load_GN, block)


def plan_from_ids(target_TK: Tensor, groups: int) -> Plan:
    """`reference.plan`, in one to three launches. target_TK is int32 and contiguous."""
    R = target_TK.numel()
    pads = next_power_of_2(R), next_power_of_2(max(groups, 1))
    if R and pads[0] * pads[1] <= FEW:
        plan = _unwritten(target_TK, groups)
        launch(
            _few_kernel, (1,), target_TK, *plan, R, groups,
            K=target_TK.size(1), BLOCK=pads[0], G_PAD=pads[1], num_warps=8,
        )  # fmt: skip
        return plan
    rank_TK, counts = _rank(target_TK, groups, None)
    return _finish(target_TK, rank_TK, counts, groups)[1]


def drop(target_TK: Tensor, groups: int, order_R: Tensor, capacity: int) -> Tensor:
    """The choices of rank below `capacity` in their group, the others -1, in three launches.

    Args:
        order_R: int32 permutation of the flat choices, first served first.
    """
    rank_TK, counts = _rank(target_TK, groups, order_R)
    before_GN, _ = _scan(counts)
    kept_TK, R = torch.empty_like(target_TK), target_TK.numel()
    if R:
        launch(
            _drop_kernel, (ceil_div(R, 1024),),
            target_TK, order_R, rank_TK, before_GN, kept_TK, R, groups, before_GN.size(1),
            capacity, PER_BLOCK=counts.per, BLOCK=1024,
        )  # fmt: skip
    return kept_TK
