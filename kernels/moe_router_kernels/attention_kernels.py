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

import triton
import triton.language as tl

LN_2 = tl.constexpr(0.6931471805599453)
LOG2_E = tl.constexpr(1.4426950408889634)


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


@triton.jit(do_not_specialize=["T", "K"])
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


@triton.jit(do_not_specialize=["T", "K"])
def _queries_kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, first_ptr, last_ptr, target_ptr, count_ptr, gate_ptr, out_ptr, lse_ptr,
    grad_ptr, grad_lse_ptr, dot_ptr, grad_q_ptr, grad_gate_ptr, T, H, J, K, scale,
    D: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr, CAUSAL: tl.constexpr,
    GATED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    parts = H // J // HEADS
    m, j, part = tl.program_id(0) // parts, tl.program_id(1), tl.program_id(0) % parts
    head = j * (H // J) + part * HEADS
    token, at, cell, live = _rows(first_ptr, last_ptr, m, head, H, T, BLOCK, HEADS)
    grad = _load(grad_ptr, at, live, D)
    dot = tl.sum(grad.to(tl.float32) * _load(out_ptr, at, live, D).to(tl.float32), 1)
    # a score moves the log of the sum by its share
    dot -= tl.load(grad_lse_ptr + cell, mask=live, other=0.0) * LOG2_E
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


@triton.jit(do_not_specialize=["T"])
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
