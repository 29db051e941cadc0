"""Triton: gating fused with permutation. Specification: `reference`.

Three or four launches, no sort, no host synchronisation, no atomics:

    gate    a block of tokens: scores, top-k, weights, how often the block chose each group, and
            how many tokens of the block stand before each choice in its group
    scan    a group: where each token block's rows begin inside it, and its total
    place   a block of choices: their rows, both directions of the index
    move    a tile of hidden states, read once, written to the K rows of each token

Not covered: expert choice, capacity, and group-limited choice over numbers that are no powers of
two (the reference does them).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _limit_groups(  # type: ignore[no-untyped-def]
    ranked,
    BLOCK_T: tl.constexpr,
    G_PAD: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
):
    """-inf outside each token's best groups; a group is worth its two best experts."""
    size: tl.constexpr = G_PAD // GROUPS
    grouped = ranked.reshape(BLOCK_T, GROUPS, size)
    first, at = tl.max(grouped, 2, return_indices=True)
    others = tl.where(tl.arange(0, size)[None, None, :] == at[:, :, None], float("-inf"), grouped)
    worth = first + tl.max(others, 2)
    kept = tl.zeros((BLOCK_T, GROUPS), tl.int32)
    for _ in tl.static_range(TOP_GROUPS):
        best = tl.argmax(worth, 1)
        here = tl.arange(0, GROUPS)[None, :] == best[:, None]
        kept = tl.where(here, 1, kept)
        worth = tl.where(here, float("-inf"), worth)
    grouped = tl.where(kept[:, :, None] > 0, grouped, float("-inf"))
    return grouped.reshape(BLOCK_T, G_PAD)


@triton.jit
def _gate_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,
    bias_ptr,
    target_ptr,
    weight_ptr,
    rank_ptr,
    load_ptr,  # (G, blocks)
    T,
    G,
    E,
    blocks,
    K: tl.constexpr,
    K_PAD: tl.constexpr,
    G_PAD: tl.constexpr,
    BLOCK_T: tl.constexpr,
    SOFTMAX: tl.constexpr,
    BIASED: tl.constexpr,
    RENORMALISE: tl.constexpr,
    GROUPS: tl.constexpr,  # of neighbouring experts; 1 is no limit
    TOP_GROUPS: tl.constexpr,
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
    if GROUPS > 1:
        ranked = _limit_groups(ranked, BLOCK_T, G_PAD, GROUPS, TOP_GROUPS)

    slot = tl.arange(0, K_PAD)
    raw = tl.zeros((BLOCK_T, K_PAD), tl.int32)
    weights = tl.zeros((BLOCK_T, K_PAD), tl.float32)
    chosen = tl.zeros((BLOCK_T, G_PAD), tl.int32)
    for k in tl.static_range(K):
        value, best = tl.max(ranked, 1, return_indices=True)
        here = group[None, :] == best[:, None]
        ranked = tl.where(here, float("-inf"), ranked)
        raw = tl.where((slot == k)[None, :], best[:, None], raw)
        weights = tl.where((slot == k)[None, :], value[:, None], weights)
        chosen += (here & live[:, None]).to(tl.int32)
    keep = live[:, None] & (slot < K)[None, :]
    if BIASED:
        weights = tl.gather(score, raw, 1)
    real = keep & (raw < E)  # the groups past E are null experts: no row, no weight
    weights = tl.where(real, weights, 0.0)
    if RENORMALISE:
        weights = weights / tl.maximum(tl.sum(weights, 1), 1e-20)[:, None]
    # a token chooses a group at most once, so its rank in the group counts earlier tokens
    rank = tl.gather(tl.cumsum(chosen, 0) - chosen, raw, 1)
    out = token.to(tl.int64)[:, None] * K + slot[None, :]
    tl.store(target_ptr + out, tl.where(real, raw, -1), mask=keep)
    tl.store(weight_ptr + out, weights, mask=keep)
    tl.store(rank_ptr + out, rank, mask=keep)
    load_at = group.to(tl.int64) * blocks + block
    tl.store(load_ptr + load_at, tl.sum(chosen, 0), mask=group < G)


@triton.jit
def _scan_kernel(  # type: ignore[no-untyped-def]
    load_ptr, before_ptr, total_ptr, blocks, BLOCK_N: tl.constexpr
):
    group = tl.program_id(0)
    running = tl.zeros((), tl.int32)
    for first in range(0, blocks, BLOCK_N):
        block = first + tl.arange(0, BLOCK_N)
        at = group.to(tl.int64) * blocks + block
        load = tl.load(load_ptr + at, mask=block < blocks, other=0)
        tl.store(before_ptr + at, running + tl.cumsum(load, 0) - load, mask=block < blocks)
        running += tl.sum(load, 0)
    tl.store(total_ptr + group, running)


@triton.jit
def _place_kernel(  # type: ignore[no-untyped-def]
    target_ptr,
    rank_ptr,
    before_ptr,
    total_ptr,
    src_ptr,
    choice_ptr,
    offsets_ptr,
    row_ptr,
    R,
    E,
    blocks,
    K: tl.constexpr,
    E_PAD: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
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
    real = target >= 0
    mine = tl.where(real, target, 0)
    token = choice // K
    before_at = mine.to(tl.int64) * blocks + token // BLOCK_T
    before = tl.load(before_ptr + before_at, mask=real, other=0)
    row = tl.gather(end - total, mine, 0) + before + rank
    tl.store(row_ptr + choice, tl.where(real, row, -1), mask=live)
    tl.store(src_ptr + row, token, mask=real)
    tl.store(choice_ptr + row, choice, mask=real)
    # rows past the end, if choices are missing
    unused = live & (choice >= tl.sum(total, 0))
    none = tl.full((BLOCK_R,), -1, tl.int32)
    tl.store(src_ptr + choice, none, mask=unused)
    tl.store(choice_ptr + choice, none, mask=unused)


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
    expert_groups: int = 1,
    top_groups: int = 1,
    x_TD: Tensor | None = None,
) -> dict[str, Tensor]:
    """Top-k gating, the Plan, and the routed copy of the tokens.

    Args:
        logits_TG: (T, G) fp32 or bf16, contiguous; the groups past `experts` are null.
        k: choices per token.
        score: `softmax` or `sigmoid`.
        bias_E: (experts,) fp32, added for the choice alone.
        expert_groups, top_groups: choose in the best groups of neighbouring experts; where
            `limits_groups` holds.
        x_TD: (T, D), unit stride over D; its rows are gathered if it is given.

    Returns:
        target_TK int32 (-1 for a null choice), weight_TK fp32, load_G int32 (choices of each
        group, null ones too), src_R, choice_R, offsets_G1, row_TK int32 as in a Plan of R = T * k
        rows over the experts, and rows_RD if x_TD is given (rows past the end unspecified).
    """
    T, G = logits_TG.shape
    R, device = T * k, logits_TG.device
    # few tokens a block while there are too few blocks to fill a GPU, and no tile that spills
    block_t = max(1, min(16 if T > 4096 else 8, 2048 // triton.next_power_of_2(G)))
    blocks = triton.cdiv(T, block_t)

    def ints(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=device)

    out = {"target_TK": ints(T, k), "weight_TK": torch.empty(T, k, device=device)}
    rank_TK, load_GN, before_GN, load_G = ints(T, k), ints(G, blocks), ints(G, blocks), ints(G)
    if T:
        _gate_kernel[(blocks,)](
            logits_TG,
            logits_TG if bias_E is None else bias_E,
            out["target_TK"],
            out["weight_TK"],
            rank_TK,
            load_GN,
            T,
            G,
            experts,
            blocks,
            K=k,
            K_PAD=triton.next_power_of_2(k),
            G_PAD=triton.next_power_of_2(G),
            BLOCK_T=block_t,
            SOFTMAX=score == "softmax",
            BIASED=bias_E is not None,
            RENORMALISE=renormalise,
            GROUPS=expert_groups,
            TOP_GROUPS=top_groups,
        )
    _scan_kernel[(G,)](
        load_GN, before_GN, load_G, blocks, BLOCK_N=min(2048, triton.next_power_of_2(blocks or 1))
    )
    plan = {
        "src_R": ints(R),
        "choice_R": ints(R),
        "offsets_G1": ints(experts + 1),
        "row_TK": ints(T, k),
    }
    # without tokens, someone must still write the offsets
    _place_kernel[(max(1, triton.cdiv(R, 1024)),)](
        out["target_TK"],
        rank_TK,
        before_GN,
        load_G,
        plan["src_R"],
        plan["choice_R"],
        plan["offsets_G1"],
        plan["row_TK"],
        R,
        experts,
        blocks,
        K=k,
        E_PAD=triton.next_power_of_2(experts),
        BLOCK_T=block_t,
        BLOCK_R=1024,
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
