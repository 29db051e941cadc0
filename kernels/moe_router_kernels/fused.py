"""Triton: gating fused with permutation. Specification: `reference`.

Three or four launches, no sort, no host synchronisation, no atomics:

    gate    a block of tokens: scores, top-k, weights, and how often the block chose each group
    scan    a block of groups: where each token block's rows begin inside the group
    place   a block of tokens: the row of each choice, both directions of the index
    move    a tile of hidden states, read once, written to the K rows of each token

Not covered: group-limited choice, expert choice, capacity (the reference does them).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _gate_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,
    bias_ptr,
    target_ptr,
    weight_ptr,
    load_ptr,
    T,
    G,
    E,
    K: tl.constexpr,
    K_PAD: tl.constexpr,
    G_PAD: tl.constexpr,
    BLOCK_T: tl.constexpr,
    SOFTMAX: tl.constexpr,
    BIASED: tl.constexpr,
    RENORMALISE: tl.constexpr,
):
    block = tl.program_id(0)
    token = block * BLOCK_T + tl.arange(0, BLOCK_T)
    group = tl.arange(0, G_PAD)
    live = token < T
    inside = live[:, None] & (group < G)[None, :]
    at = token.to(tl.int64)[:, None] * G + group[None, :]
    logits = tl.load(logits_ptr + at, mask=inside, other=float("-inf")).to(tl.float32)
    if SOFTMAX:
        top = tl.max(logits, 1)
        top = tl.where(live, top, 0.0)
        power = tl.exp(logits - top[:, None])
        total = tl.sum(power, 1)
        score = power / tl.where(live, total, 1.0)[:, None]
    else:
        score = 1.0 / (1.0 + tl.exp(-logits))
    ranked = score
    if BIASED:
        bias = tl.load(bias_ptr + group, mask=group < E, other=0.0)
        ranked = score + bias[None, :]
    ranked = tl.where((group < G)[None, :], ranked, float("-inf"))

    slot = tl.arange(0, K_PAD)
    targets = tl.full((BLOCK_T, K_PAD), -1, tl.int32)
    weights = tl.zeros((BLOCK_T, K_PAD), tl.float32)
    load = tl.zeros((G_PAD,), tl.int32)
    for k in tl.static_range(K):
        best = tl.argmax(ranked, 1)
        here = group[None, :] == best[:, None]
        weight = tl.sum(tl.where(here, score, 0.0), 1)
        ranked = tl.where(here, float("-inf"), ranked)
        real = best < E  # the groups past E are null experts: no row, no weight
        targets = tl.where((slot == k)[None, :], tl.where(real, best, -1)[:, None], targets)
        weights = tl.where((slot == k)[None, :], tl.where(real, weight, 0.0)[:, None], weights)
        load += tl.sum((here & live[:, None]).to(tl.int32), 0)
    if RENORMALISE:
        weights = weights / tl.maximum(tl.sum(weights, 1), 1e-20)[:, None]
    out = token.to(tl.int64)[:, None] * K + slot[None, :]
    keep = live[:, None] & (slot < K)[None, :]
    tl.store(target_ptr + out, targets, mask=keep)
    tl.store(weight_ptr + out, weights, mask=keep)
    tl.store(load_ptr + block.to(tl.int64) * G + group, load, mask=group < G)


@triton.jit
def _scan_kernel(  # type: ignore[no-untyped-def]
    load_ptr, before_ptr, total_ptr, blocks, G, BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr
):
    group = tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G)
    running = tl.zeros((BLOCK_G,), tl.int32)
    for first in range(0, blocks, BLOCK_N):
        block = first + tl.arange(0, BLOCK_N)
        inside = (block < blocks)[:, None] & (group < G)[None, :]
        at = block.to(tl.int64)[:, None] * G + group[None, :]
        load = tl.load(load_ptr + at, mask=inside, other=0)
        before = running[None, :] + tl.cumsum(load, 0) - load
        tl.store(before_ptr + at, before, mask=inside)
        running += tl.sum(load, 0)
    tl.store(total_ptr + group, running, mask=group < G)


@triton.jit
def _place_kernel(  # type: ignore[no-untyped-def]
    target_ptr,
    before_ptr,
    total_ptr,
    src_ptr,
    choice_ptr,
    offsets_ptr,
    row_ptr,
    T,
    E,
    G,
    K: tl.constexpr,
    K_PAD: tl.constexpr,
    E_PAD: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    block = tl.program_id(0)
    token = block * BLOCK_T + tl.arange(0, BLOCK_T)
    slot = tl.arange(0, K_PAD)
    group = tl.arange(0, E_PAD)
    keep = (token < T)[:, None] & (slot < K)[None, :]
    choice = token[:, None] * K + slot[None, :]
    target = tl.load(target_ptr + choice.to(tl.int64), mask=keep, other=-1)

    total = tl.load(total_ptr + group, mask=group < E, other=0)
    end = tl.cumsum(total, 0)
    first = end - total
    if block == 0:
        tl.store(offsets_ptr + group + 1, end, mask=group < E)
        tl.store(offsets_ptr + group, tl.zeros((E_PAD,), tl.int32), mask=group == 0)
    start = first + tl.load(before_ptr + block.to(tl.int64) * G + group, mask=group < E, other=0)

    # a token chooses a group at most once, so its rank in the group counts earlier tokens
    chosen = tl.zeros((BLOCK_T, E_PAD), tl.int32)
    for k in tl.static_range(K):
        mine = tl.sum(tl.where((slot == k)[None, :], target, 0), 1)
        chosen += (group[None, :] == mine[:, None]).to(tl.int32)
    place = start[None, :] + tl.cumsum(chosen, 0) - chosen

    for k in tl.static_range(K):
        mine = tl.sum(tl.where((slot == k)[None, :], target, 0), 1)
        here = group[None, :] == mine[:, None]
        row = tl.sum(tl.where(here, place, 0), 1)
        real = (token < T) & (mine >= 0)
        flat = token.to(tl.int64) * K + k
        tl.store(row_ptr + flat, tl.where(real, row, -1), mask=token < T)
        tl.store(src_ptr + row, token, mask=real)
        tl.store(choice_ptr + row, flat.to(tl.int32), mask=real)

    # rows past the end, if choices are missing
    used = tl.sum(total, 0)
    past = (block * BLOCK_T + tl.arange(0, BLOCK_T))[:, None] * K + slot[None, :]
    unused = keep & (past >= used)
    tl.store(src_ptr + past.to(tl.int64), tl.full((BLOCK_T, K_PAD), -1, tl.int32), mask=unused)
    tl.store(choice_ptr + past.to(tl.int64), tl.full((BLOCK_T, K_PAD), -1, tl.int32), mask=unused)


@triton.jit
def _move_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    row_ptr,
    rows_ptr,
    T,
    D,
    stride_x,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (token < T)[:, None] & (column < D)[None, :]
    at = token.to(tl.int64)[:, None] * stride_x + column[None, :]
    value = tl.load(x_ptr + at, mask=inside)
    for k in tl.static_range(K):
        row = tl.load(row_ptr + token.to(tl.int64) * K + k, mask=token < T, other=-1)
        to = row.to(tl.int64)[:, None] * D + column[None, :]
        tl.store(rows_ptr + to, value, mask=inside & (row >= 0)[:, None])


def gate_and_plan(
    logits_TG: Tensor,
    k: int,
    *,
    experts: int,
    score: str = "softmax",
    bias_E: Tensor | None = None,
    renormalise: bool = True,
    x_TD: Tensor | None = None,
) -> dict[str, Tensor]:
    """Top-k gating, the Plan, and the routed copy of the tokens.

    Args:
        logits_TG: (T, G) fp32 or bf16, contiguous; the groups past `experts` are null.
        k: choices per token.
        score: `softmax` or `sigmoid`.
        bias_E: (experts,) fp32, added for the choice alone.
        x_TD: (T, D), unit stride over D; its rows are gathered if it is given.

    Returns:
        target_TK int32 (-1 for a null choice), weight_TK fp32, load_G int32 (choices of each
        group, null ones too), src_R, choice_R, offsets_G1, row_TK int32 as in a Plan of R = T * k
        rows over the experts, and rows_RD if x_TD is given (rows past the end unspecified).
    """
    T, G = logits_TG.shape
    R, device = T * k, logits_TG.device
    # 16 elements a thread: larger tiles spill (T x 128 groups, top-8, sm_90)
    block_t = max(1, min(32, 2048 // triton.next_power_of_2(G)))
    blocks = triton.cdiv(T, block_t)
    place_blocks = max(blocks, 1)  # without tokens, someone must still write the offsets

    def ints(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=device)

    out = {"target_TK": ints(T, k), "weight_TK": torch.empty(T, k, device=device)}
    load_NG, before_NG, load_G = ints(blocks, G), ints(place_blocks, G), ints(G)
    if T:
        _gate_kernel[(blocks,)](
            logits_TG,
            logits_TG if bias_E is None else bias_E,
            out["target_TK"],
            out["weight_TK"],
            load_NG,
            T,
            G,
            experts,
            K=k,
            K_PAD=triton.next_power_of_2(k),
            G_PAD=triton.next_power_of_2(G),
            BLOCK_T=block_t,
            SOFTMAX=score == "softmax",
            BIASED=bias_E is not None,
            RENORMALISE=renormalise,
        )
    _scan_kernel[(triton.cdiv(G, 8),)](
        load_NG, before_NG, load_G, blocks, G, BLOCK_N=128, BLOCK_G=8
    )
    plan = {
        "src_R": ints(R),
        "choice_R": ints(R),
        "offsets_G1": ints(experts + 1),
        "row_TK": ints(T, k),
    }
    _place_kernel[(place_blocks,)](
        out["target_TK"],
        before_NG,
        load_G,
        plan["src_R"],
        plan["choice_R"],
        plan["offsets_G1"],
        plan["row_TK"],
        T,
        experts,
        G,
        K=k,
        K_PAD=triton.next_power_of_2(k),
        E_PAD=triton.next_power_of_2(experts),
        BLOCK_T=block_t,
    )
    out |= plan | {"load_G": load_G}
    return out if x_TD is None else out | {"rows_RD": _move(x_TD, plan["row_TK"])}


def _move(x_TD: Tensor, row_TK: Tensor) -> Tensor:
    """(T * K, D): the token of each row; rows past the end unspecified."""
    (T, K), D = row_TK.shape, x_TD.size(1)
    rows_RD = x_TD.new_empty(T * K, D)
    block_d = min(256, triton.next_power_of_2(max(D, 1)))
    block_t = max(1, 2048 // block_d)
    if T and D:
        _move_kernel[(triton.cdiv(T, block_t), triton.cdiv(D, block_d))](
            x_TD, row_TK, rows_RD, T, D, x_TD.stride(0), K=K, BLOCK_T=block_t, BLOCK_D=block_d
        )
    return rows_RD
