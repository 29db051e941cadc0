"""Triton: rows straight into the memory of another GPU, and flags that say when they are whole.

A peer's inbox is HEADER bytes of flags, one int64 for each source, then two regions used in turn.
Epochs count exchanges on the device, so that a captured CUDA graph can be replayed. Nothing waits
without a bound: a peer that is gone leaves a mark in `told`, and no hung or trapped GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

HEADER = 4096  # bytes: flags of up to 512 ranks, and what follows stays aligned
_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit
def _put_kernel(  # type: ignore[no-untyped-def]
    x_ptr, src_ptr, peer_ptr, start_ptr, at_ptr, epoch_ptr, offset, region, R, D,
    W: tl.constexpr, GATHER: tl.constexpr, ALIGNED: tl.constexpr, HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    parity = (tl.load(epoch_ptr) + 1) & 1
    for row in range(tl.program_id(0), R, tl.num_programs(0)):
        peer = row * 0
        for w in tl.static_range(1, W):
            peer += row >= tl.load(start_ptr + w)
        token = row
        if GATHER:
            token = tl.load(src_ptr + row)
        if token >= 0:  # an empty slot keeps what it has, nobody reads it
            place = tl.load(at_ptr + peer) + row - tl.load(start_ptr + peer)
            # int64: rows * D passes 2**31
            inbox = tl.load(peer_ptr + peer) + HEAD + parity * region + offset
            out_ptr = (
                inbox.to(tl.pointer_type(x_ptr.dtype.element_ty)) + tl.cast(place, tl.int64) * D
            )
            if ALIGNED:
                out_ptr = tl.multiple_of(out_ptr, 16)
            from_ptr = x_ptr + tl.cast(token, tl.int64) * D
            for first in range(0, D, BLOCK):
                column = first + tl.arange(0, BLOCK)
                word = tl.load(from_ptr + column, mask=column < D)
                tl.store(out_ptr + column, word, mask=column < D)


@triton.jit
def _signal_kernel(peer_ptr, epoch_ptr, rank, W: tl.constexpr):  # type: ignore[no-untyped-def]
    epoch = tl.load(epoch_ptr) + 1
    for w in tl.static_range(W):
        flag_ptr = tl.load(peer_ptr + w).to(tl.pointer_type(tl.int64)) + rank
        # the kernels before this one are done; release makes their rows seen before the flag
        tl.atomic_xchg(flag_ptr, epoch, sem="release", scope="sys")
    tl.store(epoch_ptr, epoch)


@triton.jit
def _wait_kernel(flag_ptr, epoch_ptr, told_ptr, bound, W: tl.constexpr):  # type: ignore[no-untyped-def]
    epoch = tl.load(epoch_ptr)
    for w in tl.static_range(W):
        tries = 0
        seen = tl.atomic_add(flag_ptr + w, 0, sem="acquire", scope="sys")
        while (seen < epoch) & (tries < bound):
            seen = tl.atomic_add(flag_ptr + w, 0, sem="acquire", scope="sys")
            tries += 1
        if seen < epoch:
            tl.store(told_ptr, 1)


def put(
    x: Tensor,
    src_R: Tensor | None,
    peers_W: Tensor,
    start_W: Tensor,
    at_W: Tensor,
    epoch: Tensor,
    *,
    rows: int,
    offset: int,
    region: int,
    programs: int = 128,
) -> None:
    """Write rows into the inboxes of their ranks.

    Args:
        x: (T, D) of elements of 2, 4 or 8 bytes, contiguous; rows of 16 bytes move fastest.
        src_R: (R,) int32, the row of x in each slot, -1 for none; None: R rows of x in order.
        peers_W: int64, addresses of the inboxes.
        start_W, at_W: int32, where the slots of rank w begin here, and in its part there.
        epoch: int64 scalar: exchanges that were signalled.
        offset, region: bytes: where the part begins in a region, and the region's length.
    """
    words = x.view(_WORDS[x.element_size()])
    columns = words.size(1)
    if rows and columns:
        _put_kernel[(min(rows, programs),)](
            words, words if src_R is None else src_R, peers_W, start_W, at_W, epoch, offset, region,
            rows, columns, W=peers_W.numel(), GATHER=src_R is not None,
            ALIGNED=columns * words.element_size() % 16 == 0, HEAD=HEADER,
            BLOCK=min(4096, triton.next_power_of_2(columns)), num_warps=8,
        )  # fmt: skip


def signal(peers_W: Tensor, epoch: Tensor, rank: int) -> None:
    """Tell every peer that this rank's rows of the next epoch are whole."""
    _signal_kernel[(1,)](peers_W, epoch, rank, W=peers_W.numel(), num_warps=1)


def wait(flags_W: Tensor, epoch: Tensor, told: Tensor, bound: int) -> None:
    """Until every peer has signalled the epoch, or `bound` looks at a flag: then told becomes 1.

    Args:
        flags_W: int64, of the own inbox.
    """
    _wait_kernel[(1,)](flags_W, epoch, told, bound, W=flags_W.numel(), num_warps=1)
