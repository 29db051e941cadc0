"""Triton: rows straight into the memory of another GPU, and flags that say when they are whole.

A peer's inbox is HEADER bytes of flags, an int64 for each source in each half, then one region.
First half: the source reads nothing in its own inbox any more; second half: what it put is whole.
The last word of the first half becomes 1 once a peer was silent for too long: from then on each
flag is looked at once, so that a peer that is gone costs its time once, not once an exchange.
Epochs count exchanges on the device, so that a captured CUDA graph can be replayed. Nothing waits
without a bound: a peer that is gone leaves a mark in `told`, and no hung or trapped GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_router_kernels.launch import launch
from moe_router_kernels.sizes import next_power_of_2

HEADER = 4096  # bytes: flags of up to 255 ranks, and what follows stays aligned
_HALF = HEADER // 8 // 2  # int64: where the second half of the flags begins
_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit
def _tell(peer_ptr, at, epoch, W: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write the epoch into a flag of every inbox. The kernels before this one are done; release
    makes what they wrote and read seen before the flag."""
    for w in tl.static_range(W):
        flag_ptr = tl.load(peer_ptr + w).to(tl.pointer_type(tl.int64)) + at
        tl.atomic_xchg(flag_ptr, epoch, sem="release", scope="sys")


@triton.jit
def _hears(  # type: ignore[no-untyped-def]
    flag_ptr, lost_ptr, told_ptr, epoch, bound, W: tl.constexpr
):
    """Whether every source has written the epoch, within `bound` looks at each flag."""
    silent = 0
    bound = tl.where(tl.load(lost_ptr) == 0, bound, 0)
    for w in tl.static_range(W):
        tries = 0
        seen = tl.atomic_add(flag_ptr + w, 0, sem="acquire", scope="sys")
        while (seen < epoch) & (tries < bound):
            seen = tl.atomic_add(flag_ptr + w, 0, sem="acquire", scope="sys")
            tries += 1
        silent += (seen < epoch).to(tl.int32)
    if silent > 0:
        tl.store(told_ptr, 1)
        tl.store(lost_ptr, 1)
    return silent == 0


@triton.jit
def _put_kernel(  # type: ignore[no-untyped-def]
    x_ptr, src_ptr, also_ptr, peer_ptr, flag_ptr, epoch_ptr, told_ptr, start_ptr, at_ptr,
    x_offset, head_offset, tail_offset, turns, D, rank, bound,
    W: tl.constexpr, GATHER: tl.constexpr, ALSO: tl.constexpr, SPLIT: tl.constexpr,
    ALSO_PAD: tl.constexpr, ALIGNED: tl.constexpr, HEAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    epoch = tl.load(epoch_ptr) + 1
    if tl.program_id(0) == 0:
        _tell(peer_ptr, rank, epoch, W)
    heard = _hears(flag_ptr, flag_ptr + HEAD // 16 - 1, told_ptr, epoch, bound, W)
    for turn in range(tl.program_id(0), tl.where(heard, turns, 0), tl.num_programs(0)):
        # peers take turns, so that rows that stay here are copied while others cross the link
        peer = (turn + rank + 1) % W
        start = tl.load(start_ptr + peer)
        row = start + turn // W
        live = row < tl.load(start_ptr + peer + 1)
        place = tl.cast(tl.load(at_ptr + peer) + turn // W, tl.int64)  # rows * D passes 2**31
        inbox = tl.load(peer_ptr + peer) + HEAD
        if live:
            if ALSO > 0:
                column = tl.arange(0, ALSO_PAD)
                word = tl.load(also_ptr + tl.cast(row, tl.int64) * ALSO + column, column < ALSO)
                head = head_offset // 4 + place * SPLIT + column
                tail = tail_offset // 4 + place * (ALSO - SPLIT) + column - SPLIT
                out_ptr = inbox.to(tl.pointer_type(tl.int32))
                to = tl.where(column < SPLIT, head, tail)
                tl.store(out_ptr + to, word, mask=column < ALSO)
            token = row
            if GATHER:
                token = tl.load(src_ptr + row)
            if token >= 0:  # an empty slot keeps what it has, nobody reads it
                to_ptr = (inbox + x_offset).to(tl.pointer_type(x_ptr.dtype.element_ty)) + place * D
                if ALIGNED:
                    to_ptr = tl.multiple_of(to_ptr, 16)
                from_ptr = x_ptr + tl.cast(token, tl.int64) * D
                for first in range(0, D, BLOCK):
                    column_D = first + tl.arange(0, BLOCK)
                    word_D = tl.load(from_ptr + column_D, mask=column_D < D)
                    tl.store(to_ptr + column_D, word_D, mask=column_D < D)


@triton.jit
def _meet_kernel(  # type: ignore[no-untyped-def]
    peer_ptr, flag_ptr, epoch_ptr, told_ptr, rank, bound, W: tl.constexpr, HALF: tl.constexpr
):
    epoch = tl.load(epoch_ptr) + 1
    _tell(peer_ptr, HALF + rank, epoch, W)
    tl.store(epoch_ptr, epoch)
    _hears(flag_ptr + HALF, flag_ptr + HALF - 1, told_ptr, epoch, bound, W)


def put(
    x: Tensor,
    src_R: Tensor | None,
    also: Tensor | None,
    split: int,
    peers_W: Tensor,
    flags: Tensor,
    epoch: Tensor,
    told: Tensor,
    places: tuple[Tensor, Tensor],
    *,
    most: int,
    offsets: tuple[int, int, int],
    rank: int,
    bound: int,
    programs: int = 256,
) -> None:
    """Write rows into the inboxes of their ranks, once these read nothing there any more.

    Args:
        x: (T, D) of elements of 2, 4 or 8 bytes, contiguous; rows of 16 bytes move fastest.
        src_R: (R,) int32, the row of x in each slot, -1 for none; None: R rows of x in order.
        also: (R, P) int32 of every slot, empty or not; None: nothing goes with the rows.
        split: the first so many columns of `also` are one part, the others the next.
        peers_W: int64, addresses of the inboxes.
        flags: int64, HEADER bytes of the own inbox.
        epoch: int64 scalar: exchanges that are over.
        told: int32 scalar, becomes 1 if a peer did not answer within `bound` looks at its flag.
        places: int32, where the slots of rank w begin here (W + 1), and in its parts there (W).
        most: rows of the rank that gets most.
        offsets: bytes, multiples of 16: where x and the parts of `also` begin in a region.
    """
    words = x.view(_WORDS[x.element_size()])
    columns, W = words.size(1), peers_W.numel()
    wide = 0 if also is None else also.size(1)
    turns = W * most
    launch(
        _put_kernel, (max(1, min(turns, programs)),),
        words, words if src_R is None else src_R, words if also is None else also, peers_W, flags,
        epoch, told, *places, *offsets, turns, columns, rank, bound, W=W,
        GATHER=src_R is not None, ALSO=wide, SPLIT=split,
        ALSO_PAD=next_power_of_2(max(wide, 1)),
        ALIGNED=columns * words.element_size() % 16 == 0, HEAD=HEADER,
        BLOCK=min(4096, next_power_of_2(max(columns, 1))), num_warps=8,
    )  # fmt: skip


def meet(
    peers_W: Tensor, flags: Tensor, epoch: Tensor, told: Tensor, *, rank: int, bound: int
) -> None:
    """Tell every peer that this rank's rows are whole, and wait until theirs are: the epoch ends.

    Args:
        told: int32 scalar, becomes 1 if a peer did not answer within `bound` looks at its flag.
    """
    launch(
        _meet_kernel, (1,), peers_W, flags, epoch, told, rank, bound,
        W=peers_W.numel(), HALF=_HALF, num_warps=1,
    )  # fmt: skip
