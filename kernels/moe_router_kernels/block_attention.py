"""Triton: attention of query blocks to the key blocks that a router chose. Specification:
`reference_attention.attend_blocks`.

A unit is a query block and a KV head, a group is a key block and a KV head. The forward pass and
the gradient of the queries walk a unit's list of key blocks, the gradient of keys and values walks
a group's list of units, which is the Plan of the same choice: no atomics, and the same sums every
time. Scores are never written; the backward pass takes them again from the log of their sum.

The query heads of a KV head have one list, so a program computes several of them: their rows
stand under each other in one tile and share the loads of keys and values. A list holds first the
pairs of blocks that need no mask; their loop has none, and its loads are copied ahead by the copy
engine. Exponentials are to base 2, with log2(e) in the scale.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_router_kernels.scratch import scratch

LOG2_E = 1.4426950408889634
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _tokens(first_ptr, last_ptr, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The tokens of block n, and which of them exist."""
    token = tl.load(first_ptr + n) + tl.arange(0, BLOCK)
    return token, token < tl.load(last_ptr + n)


@triton.jit
def _rows(  # type: ignore[no-untyped-def]
    first_ptr, last_ptr, m, head, H, T, BLOCK: tl.constexpr, HEADS: tl.constexpr
):
    """Rows of a tile, heads inside tokens: token, row of (T, H), cell of (H, T), which exist."""
    row = tl.arange(0, BLOCK * HEADS)
    token = tl.load(first_ptr + m) + row // HEADS
    of = head + row % HEADS
    # int64: row * D passes 2**31 at 131072 tokens of 128 heads
    at = token.to(tl.int64) * H + of
    return token, at, of.to(tl.int64) * T + token, token < tl.load(last_ptr + m)


@triton.jit
def _load(ptr, at, live, D: tl.constexpr):  # type: ignore[no-untyped-def]
    """(rows, D), 0 in rows that do not exist."""
    cell = at[:, None] * D + tl.arange(0, D)[None, :]
    return tl.load(ptr + cell, mask=live[:, None], other=0.0)


@triton.jit
def _store(ptr, value, at, live, D: tl.constexpr):  # type: ignore[no-untyped-def]
    cell = at[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(ptr + cell, value.to(ptr.dtype.element_ty), mask=live[:, None])


@triton.jit
def _blocks_of(ptr, T, heads, BLOCK: tl.constexpr, D: tl.constexpr):  # type: ignore[no-untyped-def]
    """Whole blocks of one head of a (T, heads, D) tensor, for the copy engine."""
    width = heads * D
    return tl.make_tensor_descriptor(ptr, [T, width], [width, 1], [BLOCK, D])


@triton.jit
def _pairs(token_R, live_R, column_C, there_C, CAUSAL: tl.constexpr):  # type: ignore[no-untyped-def]
    """(rows, columns): both exist, and the key is not later."""
    pair = live_R[:, None] & there_C[None, :]
    if CAUSAL:
        pair = pair & (column_C[None, :] <= token_R[:, None])
    return pair


@triton.jit
def _add_block(  # type: ignore[no-untyped-def]
    best, total, acc, score, v, gate, scale, MASKED: tl.constexpr, PRECISION: tl.constexpr
):
    """One key block more in a running softmax to base 2; score is -inf where masked."""
    higher = tl.maximum(best, tl.max(score, 1) * scale)
    base = higher
    if MASKED:  # a row without a key so far has no finite maximum
        base = tl.where(higher == float("-inf"), 0.0, higher)
    power = tl.exp2(score * scale - base[:, None])
    fade = tl.exp2(best - base)
    total = total * fade + tl.sum(power, 1)
    acc = acc * fade[:, None]
    acc = tl.dot((power * gate).to(v.dtype), v, acc, input_precision=PRECISION)
    return higher, total, acc


@triton.jit
def _forward_kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, first_ptr, last_ptr, target_ptr, count_ptr, gate_ptr, out_ptr, lse_ptr,
    T, H, J, K, scale,
    D: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr, CAUSAL: tl.constexpr,
    GATED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    parts = H // J // HEADS
    m, j = tl.program_id(0) // parts, tl.program_id(1)
    head = j * (H // J) + tl.program_id(0) % parts * HEADS
    token, at, cell, live = _rows(first_ptr, last_ptr, m, head, H, T, BLOCK, HEADS)
    q = _load(q_ptr, at, live, D)
    best = tl.full((BLOCK * HEADS,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK * HEADS,), tl.float32)
    acc = tl.zeros((BLOCK * HEADS, D), tl.float32)
    unit = m * J + j
    whole, count = tl.load(count_ptr + 2 * unit), tl.load(count_ptr + 2 * unit + 1)
    list_ptr = target_ptr + unit.to(tl.int64) * K
    k_blocks, v_blocks = _blocks_of(k_ptr, T, J, BLOCK, D), _blocks_of(v_ptr, T, J, BLOCK, D)
    gate = 1.0
    # read one step ahead: a load whose address another load gives is not copied ahead
    begin = tl.load(first_ptr + tl.maximum(tl.load(list_ptr), 0))
    for choice in range(0, whole):
        k, v = k_blocks.load([begin, j * D]), v_blocks.load([begin, j * D])
        following = tl.load(list_ptr + tl.minimum(choice + 1, whole - 1))
        begin = tl.load(first_ptr + following)
        if GATED:
            gate = tl.load(gate_ptr + unit.to(tl.int64) * K + choice)
        score = tl.dot(q, k.T, input_precision=PRECISION)
        best, total, acc = _add_block(best, total, acc, score, v, gate, scale, False, PRECISION)
    for choice in range(whole, count):
        column, there = _tokens(first_ptr, last_ptr, tl.load(list_ptr + choice), BLOCK)
        key_at = column.to(tl.int64) * J + j
        k, v = _load(k_ptr, key_at, there, D), _load(v_ptr, key_at, there, D)
        if GATED:
            gate = tl.load(gate_ptr + unit.to(tl.int64) * K + choice)
        score = tl.dot(q, k.T, input_precision=PRECISION)
        score = tl.where(_pairs(token, live, column, there, CAUSAL), score, float("-inf"))
        best, total, acc = _add_block(best, total, acc, score, v, gate, scale, True, PRECISION)
    some = total > 0
    total = tl.where(some, total, 1.0)
    _store(out_ptr, acc / total[:, None], at, live, D)
    tl.store(lse_ptr + cell, tl.where(some, best + tl.log2(total), float("inf")), mask=live)


@triton.jit
def _grad_of_score(  # type: ignore[no-untyped-def]
    q, grad, k, v, lse, dot, gate, pair, scale, MASKED: tl.constexpr, PRECISION: tl.constexpr
):
    """Rows by keys: d loss / d score but for the scale, and the softmax times d loss / d share."""
    score = tl.dot(q, k.T, input_precision=PRECISION) * scale
    if MASKED:
        score = tl.where(pair, score, float("-inf"))
    share = tl.exp2(score - lse[:, None])
    of_gate = share * tl.dot(grad, v.T, input_precision=PRECISION)
    return of_gate * gate - share * dot[:, None], of_gate


@triton.jit
def _queries_kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, first_ptr, last_ptr, target_ptr, count_ptr, gate_ptr, out_ptr, lse_ptr,
    grad_ptr, dot_ptr, grad_q_ptr, grad_gate_ptr, T, H, J, K, scale,
    D: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr, CAUSAL: tl.constexpr,
    GATED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    parts = H // J // HEADS
    m, j, part = tl.program_id(0) // parts, tl.program_id(1), tl.program_id(0) % parts
    head = j * (H // J) + part * HEADS
    token, at, cell, live = _rows(first_ptr, last_ptr, m, head, H, T, BLOCK, HEADS)
    grad = _load(grad_ptr, at, live, D)
    dot = tl.sum(grad.to(tl.float32) * _load(out_ptr, at, live, D).to(tl.float32), 1)
    tl.store(dot_ptr + cell, dot, mask=live)  # for the keys' kernel
    q = _load(q_ptr, at, live, D)
    lse = tl.load(lse_ptr + cell, mask=live, other=float("inf"))
    acc = tl.zeros((BLOCK * HEADS, D), tl.float32)
    unit = m * J + j
    whole, count = tl.load(count_ptr + 2 * unit), tl.load(count_ptr + 2 * unit + 1)
    list_ptr = target_ptr + unit.to(tl.int64) * K
    gates_ptr = gate_ptr + unit.to(tl.int64) * K
    grad_gates_ptr = grad_gate_ptr + (unit.to(tl.int64) * parts + part) * K
    k_blocks, v_blocks = _blocks_of(k_ptr, T, J, BLOCK, D), _blocks_of(v_ptr, T, J, BLOCK, D)
    gate = 1.0
    begin = tl.load(first_ptr + tl.maximum(tl.load(list_ptr), 0))
    for choice in range(0, whole):
        k, v = k_blocks.load([begin, j * D]), v_blocks.load([begin, j * D])
        following = tl.load(list_ptr + tl.minimum(choice + 1, whole - 1))
        begin = tl.load(first_ptr + following)
        if GATED:
            gate = tl.load(gates_ptr + choice)
        of_score, of_gate = _grad_of_score(
            q, grad, k, v, lse, dot, gate, True, scale, False, PRECISION
        )
        if GATED:
            tl.store(grad_gates_ptr + choice, tl.sum(of_gate))
        acc = tl.dot(of_score.to(k.dtype), k, acc, input_precision=PRECISION)
    for choice in range(whole, count):
        column, there = _tokens(first_ptr, last_ptr, tl.load(list_ptr + choice), BLOCK)
        key_at = column.to(tl.int64) * J + j
        k, v = _load(k_ptr, key_at, there, D), _load(v_ptr, key_at, there, D)
        pair = _pairs(token, live, column, there, CAUSAL)
        if GATED:
            gate = tl.load(gates_ptr + choice)
        of_score, of_gate = _grad_of_score(
            q, grad, k, v, lse, dot, gate, pair, scale, True, PRECISION
        )
        if GATED:
            tl.store(grad_gates_ptr + choice, tl.sum(of_gate))
        acc = tl.dot(of_score.to(k.dtype), k, acc, input_precision=PRECISION)
    _store(grad_q_ptr, acc * (scale * LN_2), at, live, D)


@triton.jit
def _add_queries(  # type: ignore[no-untyped-def]
    acc_k, acc_v, q, grad, k, v, lse, dot, gate, pair, scale,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Keys by rows, so that no product needs a transposed left side."""
    score = tl.dot(k, q.T, input_precision=PRECISION) * scale
    if MASKED:
        score = tl.where(pair, score, float("-inf"))
    share = tl.exp2(score - lse[None, :])
    gated = share * gate
    acc_v = tl.dot(gated.to(grad.dtype), grad, acc_v, input_precision=PRECISION)
    of_share = tl.dot(v, grad.T, input_precision=PRECISION)
    of_score = gated * of_share - share * dot[None, :]
    acc_k = tl.dot(of_score.to(q.dtype), q, acc_k, input_precision=PRECISION)
    return acc_k, acc_v


@triton.jit
def _keys_kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, first_ptr, last_ptr, block_ptr, gate_ptr, offsets_ptr, lse_ptr, grad_ptr,
    dot_ptr, grad_k_ptr, grad_v_ptr, T, H, J, scale,
    D: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr,
    GATED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    n, j = tl.program_id(0), tl.program_id(1)
    column, there = _tokens(first_ptr, last_ptr, n, BLOCK)
    key_at = column.to(tl.int64) * J + j
    k, v = _load(k_ptr, key_at, there, D), _load(v_ptr, key_at, there, D)
    acc_k = tl.zeros((BLOCK, D), tl.float32)
    acc_v = tl.zeros((BLOCK, D), tl.float32)
    group = 2 * (n * J + j)
    start, middle = tl.load(offsets_ptr + group), tl.load(offsets_ptr + group + 1)
    end = tl.load(offsets_ptr + group + 2)
    q_blocks, grad_blocks = _blocks_of(q_ptr, T, H, BLOCK, D), _blocks_of(grad_ptr, T, H, BLOCK, D)
    gate = 1.0
    begin = tl.load(first_ptr + tl.load(block_ptr + start, mask=start < middle, other=0))
    for step in range(0, (middle - start) * GROUP):
        head = j * GROUP + step % GROUP
        q, grad = q_blocks.load([begin, head * D]), grad_blocks.load([begin, head * D])
        cell = head.to(tl.int64) * T + begin + tl.arange(0, BLOCK)
        lse, dot = tl.load(lse_ptr + cell), tl.load(dot_ptr + cell)
        if GATED:
            gate = tl.load(gate_ptr + start + step // GROUP)
        following = tl.minimum(start + (step + 1) // GROUP, middle - 1)
        begin = tl.load(first_ptr + tl.load(block_ptr + following))
        acc_k, acc_v = _add_queries(
            acc_k, acc_v, q, grad, k, v, lse, dot, gate, True, scale, False, PRECISION
        )
    for step in range(middle * GROUP, end * GROUP):
        m, head = tl.load(block_ptr + step // GROUP), j * GROUP + step % GROUP
        token, at, cell, live = _rows(first_ptr, last_ptr, m, head, H, T, BLOCK, 1)
        q, grad = _load(q_ptr, at, live, D), _load(grad_ptr, at, live, D)
        lse = tl.load(lse_ptr + cell, mask=live, other=float("inf"))
        dot = tl.load(dot_ptr + cell, mask=live, other=0.0)
        if GATED:
            gate = tl.load(gate_ptr + step // GROUP)
        pair = there[:, None] & live[None, :]
        if CAUSAL:
            pair = pair & (column[:, None] <= token[None, :])
        acc_k, acc_v = _add_queries(
            acc_k, acc_v, q, grad, k, v, lse, dot, gate, pair, scale, True, PRECISION
        )
    _store(grad_k_ptr, acc_k * (scale * LN_2), key_at, there, D)
    _store(grad_v_ptr, acc_v, key_at, there, D)


class Lists(NamedTuple):
    """Who attends to whom, each pair of blocks once; N blocks, J KV heads, K choices at most.

    Attributes:
        first_N, last_N: int32, where each block begins and ends.
        target_NJK: int32, key blocks of each unit: first those that need no mask, then the
            others, then -1.
        count_NJ2: int32, how many need none, and how many there are.
        gate_NJK: fp32, factor on what a pair adds to the output; empty: 1.
    """

    first_N: Tensor
    last_N: Tensor
    target_NJK: Tensor
    count_NJ2: Tensor
    gate_NJK: Tensor


class Groups(NamedTuple):
    """The same by key block: groups 2 (n J + j) of pairs that need no mask, and the next, of those
    that do.

    Attributes:
        block_R: int32, query blocks by group.
        gate_R: fp32, the gate of each; empty: 1.
        offsets_G1: int32, their bounds.
    """

    block_R: Tensor
    gate_R: Tensor
    offsets_G1: Tensor


@dataclass(frozen=True, slots=True)
class Tile:
    """Most rows of a tile, warps, and by how many steps loads are ahead."""

    rows: int
    warps: int
    stages: int

    def heads(self, group: int, block: int, channels: int) -> int:
        """Query heads that a tile holds, of `group` that share a KV head."""
        room = self.rows * 128 // max(channels, 128) // block
        return max([n for n in (1, 2, 4, 8, 16) if n <= room and group % n == 0], default=1)

    def fitted(self, rows: int, block: int, row_bytes: int) -> "Tile":
        """The same, for a program that keeps `rows` in shared memory, beside two blocks a step."""
        stages = (SHARED_BYTES // row_bytes - rows) // (2 * block)
        # a program has an accumulator of its rows: few if they are, all registers if they are many
        warps = 4 if block * row_bytes < 64 * 128 else 8 if block * row_bytes > 64 * 256 else 0
        return Tile(self.rows, warps or self.warps, max(1, min(self.stages, stages)))


SHARED_BYTES = 220 << 10  # of an H100's 227 KiB
TILES = {
    "forward": {"wide": Tile(256, 8, 3), "middle": Tile(128, 8, 3), "narrow": Tile(128, 4, 2)},
    "queries": {"wide": Tile(128, 8, 3), "middle": Tile(128, 8, 2), "narrow": Tile(64, 4, 2)},
    "keys": {"wide": Tile(64, 8, 2), "middle": Tile(64, 8, 3), "narrow": Tile(64, 4, 2)},
}
BEST = {"forward": "narrow", "queries": "wide", "keys": "narrow"}  # docs/log.md


def _cut(kernel: str, tiles: str, q_THd: Tensor, J: int, block: int) -> tuple[int, Tile]:
    """Query heads of a tile, and the tile, by name; `auto` is the best for each kernel."""
    _, H, d = q_THd.shape
    tile = TILES[kernel][BEST[kernel] if tiles == "auto" else tiles]
    heads = 1 if kernel == "keys" else tile.heads(H // J, block, d)
    rows = heads * block * (1 if kernel == "forward" else 2)
    return heads, tile.fitted(rows, block, d * q_THd.element_size())


def _how(q_THd: Tensor, lists: Lists, block: int, causal: bool) -> dict[str, object]:
    if q_THd.device.type == "cuda":
        triton.set_allocator(scratch)
    precision = "ieee" if q_THd.dtype == torch.float32 else "tf32"
    sizes = {"D": q_THd.size(2), "BLOCK": block, "CAUSAL": causal}
    return {**sizes, "GATED": lists.gate_NJK.numel() > 0, "PRECISION": precision}


def forward(
    q_THd: Tensor, k_TJd: Tensor, v_TJd: Tensor, lists: Lists, block: int, causal: bool, tiles: str
) -> tuple[Tensor, Tensor]:
    """(T, H, d), and fp32 (H, T): log2 of the sum of the exponentials of a query's scores."""
    (T, H, d), (N, J, K) = q_THd.shape, lists.target_NJK.shape
    q_THd, k_TJd, v_TJd = (x.contiguous() for x in (q_THd, k_TJd, v_TJd))
    out, lse_HT = torch.empty_like(q_THd), torch.empty(H, T, device=q_THd.device)
    if N and H and K:
        heads, tile = _cut("forward", tiles, q_THd, J, block)
        _forward_kernel[(N * (H // J // heads), J)](
            q_THd, k_TJd, v_TJd, *lists, out, lse_HT, T, H, J, K, d**-0.5 * LOG2_E,
            HEADS=heads, num_warps=tile.warps, num_stages=tile.stages,
            **_how(q_THd, lists, block, causal),
        )  # fmt: skip
    return out, lse_HT


def backward(
    grad_THd: Tensor, q_THd: Tensor, k_TJd: Tensor, v_TJd: Tensor, lists: Lists, groups: Groups,
    out_THd: Tensor, lse_HT: Tensor, block: int, causal: bool, tiles: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of queries, keys, values and gates."""
    (T, H, d), (N, J, K) = q_THd.shape, lists.target_NJK.shape
    grad_THd, q_THd, k_TJd, v_TJd = (x.contiguous() for x in (grad_THd, q_THd, k_TJd, v_TJd))
    grads = torch.empty_like(q_THd), torch.empty_like(k_TJd), torch.empty_like(v_TJd)
    heads, tile = _cut("queries", tiles, q_THd, max(J, 1), block)
    _, keys = _cut("keys", tiles, q_THd, max(J, 1), block)
    parts = H // max(J, 1) // heads
    grad_gate = lists.gate_NJK.new_zeros(N, J, parts, K if lists.gate_NJK.numel() else 0)
    if N and H and K:
        dot_HT = torch.empty_like(lse_HT)
        how, scale = _how(q_THd, lists, block, causal), d**-0.5 * LOG2_E
        _queries_kernel[(N * parts, J)](
            q_THd, k_TJd, v_TJd, *lists, out_THd, lse_HT, grad_THd, dot_HT, grads[0], grad_gate,
            T, H, J, K, scale,
            HEADS=heads, num_warps=tile.warps, num_stages=tile.stages, **how,
        )  # fmt: skip
        _keys_kernel[(N, J)](
            q_THd, k_TJd, v_TJd, lists.first_N, lists.last_N, *groups, lse_HT, grad_THd, dot_HT,
            *grads[1:], T, H, J, scale,
            GROUP=H // J, num_warps=keys.warps, num_stages=keys.stages, **how,
        )  # fmt: skip
    return *grads, grad_gate.sum(2)
