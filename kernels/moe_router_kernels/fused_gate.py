"""Triton: from logits to choices and their weights, and back. Specification: `reference`.

One launch decides for a block of tokens: scores, top-k, weights, how often the block chose each
group, how many tokens of the block stand before each choice in its group, and what the block adds
to the sums of the losses. `planning` turns the counts into rows; where all tokens fit into one
block, the same launch does. No sort, no atomics, nothing waits for the host. The backward pass is
one launch.

Not covered: group-limited choice over numbers that are no powers of two.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_router_kernels.launch import launch
from moe_router_kernels.sizes import ceil_div, next_power_of_2
from moe_router_kernels.top_k import TAKEN, best_groups, fours, key_of, limit_groups, value_of


@triton.jit
def _load_logits(  # type: ignore[no-untyped-def]
    logits_ptr, token, T, G, G_PAD: tl.constexpr
):
    """fp32 (tokens, G_PAD), -inf past the last group and the last token.

    Read as spans of 128 groups before tokens, so that a warp holds a token whole.
    """
    span: tl.constexpr = min(G_PAD, 128)
    spans: tl.constexpr = G_PAD // span
    group = tl.arange(0, spans)[:, None, None] * span + tl.arange(0, span)[None, None, :]
    inside = (token < T)[None, :, None] & (group < G)
    at = token.to(tl.int64)[None, :, None] * G + group
    logits = tl.load(logits_ptr + at, mask=inside, other=float("-inf")).to(tl.float32)
    return logits.permute(1, 0, 2).reshape(token.shape[0], G_PAD)


@triton.jit
def _sum_exp(logits, live):  # type: ignore[no-untyped-def]
    """The largest logit, each power of e below it, and their sum."""
    x0, x1, x2, x3 = fours(logits)
    top = tl.max(tl.maximum(tl.maximum(x0, x1), tl.maximum(x2, x3)), 1)
    top = tl.where(live, top, 0.0)
    power = tl.exp(logits - top[:, None])
    x0, x1, x2, x3 = fours(power)
    total = tl.sum((x0 + x1) + (x2 + x3), 1)
    return top, power, tl.where(live, total, 1.0)


@triton.jit
def _ones(bits):  # type: ignore[no-untyped-def]
    """How many bits of an int32 are set."""
    bits = bits - ((bits >> 1) & 0x55555555)
    bits = (bits & 0x33333333) + ((bits >> 2) & 0x33333333)
    bits = (bits + (bits >> 4)) & 0x0F0F0F0F
    return ((bits * 0x01010101) >> 24) & 0xFF


@triton.jit
def _softmax(logits, live):  # type: ignore[no-untyped-def]
    """Probabilities, and the log of the sum they are divided by."""
    top, power, total = _sum_exp(logits, live)
    return power / total[:, None], top + tl.log(total)


@triton.jit
def _sigmoid(logits):  # type: ignore[no-untyped-def]
    return 1.0 / (1.0 + tl.exp(-logits))  # 0 where the logit is -inf


@triton.jit
def _gate_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,
    bias_ptr,
    raw_ptr,
    weight_ptr,
    rank_ptr,
    load_ptr,  # (G, blocks)
    share_ptr,  # (G, blocks) fp32, if SUMS
    z_ptr,  # (blocks,) fp32, if SUMS
    src_ptr,  # the Plan, if ALONE
    choice_ptr,
    offsets_ptr,
    row_ptr,
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
    GIVEN: tl.constexpr,  # the choices are read, not made
    SUMS: tl.constexpr,
    ALONE: tl.constexpr,  # there is no other block, so that rows are known here
):
    block = tl.program_id(0)
    token = block * BLOCK_T + tl.arange(0, BLOCK_T)
    group = tl.arange(0, G_PAD)
    live = token < T
    logits = _load_logits(logits_ptr, token, T, G, G_PAD)
    if SOFTMAX or SUMS:
        top, power, total = _sum_exp(logits, live)
    load_at = group.to(tl.int64) * blocks + block
    if SUMS:
        if SOFTMAX:
            share = power / total[:, None]
        else:
            score = _sigmoid(logits)
            share = score / tl.maximum(tl.sum(score, 1), 1e-20)[:, None]
        log_total = top + tl.log(total)
        tl.store(share_ptr + load_at, tl.sum(tl.where(live[:, None], share, 0.0), 0), group < G)
        tl.store(z_ptr + block, tl.sum(tl.where(live, log_total * log_total, 0.0), 0))

    slot = tl.arange(0, K_PAD)
    keep = live[:, None] & (slot < K)[None, :]
    out = token.to(tl.int64)[:, None] * K + slot[None, :]
    BY_SCORE: tl.constexpr = BIASED or GROUPS > 1  # the logits have the same order, and no rounding
    if GIVEN:
        raw = tl.load(raw_ptr + out, mask=keep, other=-1)
    else:
        ranked = logits
        if BY_SCORE:
            ranked = power / total[:, None] if SOFTMAX else _sigmoid(logits)
            if BIASED:
                bias = tl.load(bias_ptr + group, mask=group < E, other=0.0)
                ranked += bias[None, :]
            # NaN is lower than any score, but not than what its token may not choose
            ranked = tl.where(ranked == ranked, ranked, -1e30)
            ranked = tl.where((group < G)[None, :], ranked, float("-inf"))
        if GROUPS > 1:
            ranked = limit_groups(ranked, BLOCK_T, G_PAD, GROUPS, TOP_GROUPS)
        key = tl.where((group < G)[None, :], key_of(ranked), TAKEN)
        raw, won = best_groups(key, BLOCK_T, G_PAD, K, K_PAD)
        last = (slot == K - 1)[None, :]
        last_key = tl.sum(tl.where(last, won, 0), 1)[:, None]
        last_id = tl.sum(tl.where(last, raw, 0), 1)[:, None]
        chosen = (key > last_key) | ((key == last_key) & (group[None, :] <= last_id))
        # a token chooses a group at most once: a bit for each token of the block that chose it
        bit = 1 << tl.arange(0, BLOCK_T)
        chose = tl.sum(tl.where(chosen & live[:, None], bit[:, None], 0), 0)
        flat = tl.gather(chose, raw.reshape(BLOCK_T * K_PAD), 0)
        rank = _ones(flat.reshape(BLOCK_T, K_PAD) & (bit - 1)[:, None])
        tl.store(raw_ptr + out, raw, mask=keep)
        tl.store(rank_ptr + out, rank, mask=keep)
        count = _ones(chose)
        tl.store(load_ptr + load_at, count, mask=group < G)
    if GIVEN or BY_SCORE:
        # read again, from L1: a gather among registers is a shuffle for each of them
        named = keep & (raw >= 0) & (raw < G)
        picked = tl.load(logits_ptr + token.to(tl.int64)[:, None] * G + raw, mask=named, other=0.0)
        picked = picked.to(tl.float32)
    else:
        picked = value_of(won)
    weights = tl.exp(picked - top[:, None]) / total[:, None] if SOFTMAX else _sigmoid(picked)
    real = keep & (raw >= 0) & (raw < E)  # the groups past E are null experts: no row, no weight
    weights = tl.where(real, weights, 0.0)
    if RENORMALISE:
        weights = weights / tl.maximum(tl.sum(weights, 1), 1e-20)[:, None]
    tl.store(weight_ptr + out, weights, mask=keep)
    if ALONE:
        total = tl.where(group < E, count, 0)
        end = tl.cumsum(total, 0)
        tl.store(offsets_ptr + group + 1, end, mask=group < E)
        tl.store(offsets_ptr + group, tl.zeros((G_PAD,), tl.int32), mask=group == 0)
        first = tl.broadcast_to((end - total)[None, :], (BLOCK_T, G_PAD))
        row = tl.gather(first, raw, 1) + rank
        whose = tl.broadcast_to(token[:, None], (BLOCK_T, K_PAD))
        choice = whose * K + slot[None, :]
        unused = keep & (choice >= tl.sum(total, 0))
        none = tl.full((BLOCK_T, K_PAD), -1, tl.int32)
        tl.store(row_ptr + out, tl.where(real, row, -1), mask=keep)
        tl.store(src_ptr + row, whose, mask=real)
        tl.store(choice_ptr + row, choice, mask=real)
        tl.store(src_ptr + out, none, mask=unused)
        tl.store(choice_ptr + out, none, mask=unused)


@triton.jit
def _gate_backward_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,
    raw_ptr,
    grad_weight_ptr,  # (T, K) fp32
    grad_share_ptr,  # (G,) fp32, if SUMS
    grad_z_ptr,  # () fp32, if SUMS
    grad_logits_ptr,
    T,
    G,
    E,
    K: tl.constexpr,
    K_PAD: tl.constexpr,
    G_PAD: tl.constexpr,
    BLOCK_T: tl.constexpr,
    SOFTMAX: tl.constexpr,
    RENORMALISE: tl.constexpr,
    SUMS: tl.constexpr,
):
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    group, slot = tl.arange(0, G_PAD), tl.arange(0, K_PAD)
    live = token < T
    logits = _load_logits(logits_ptr, token, T, G, G_PAD)
    if SOFTMAX:
        score, log_total = _softmax(logits, live)
    else:
        score = _sigmoid(logits)
    keep = live[:, None] & (slot < K)[None, :]
    at = token.to(tl.int64)[:, None] * K + slot[None, :]
    raw = tl.load(raw_ptr + at, mask=keep, other=-1)
    real = keep & (raw >= 0) & (raw < E)
    grad = tl.load(grad_weight_ptr + at, mask=keep, other=0.0)
    grad = tl.where(real, grad, 0.0)
    if RENORMALISE:
        chosen = tl.gather(score, tl.maximum(tl.minimum(raw, G_PAD - 1), 0), 1)
        chosen = tl.where(real, chosen, 0.0)
        total = tl.sum(chosen, 1)
        mean = tl.sum(grad * chosen, 1) / tl.maximum(total, 1e-20)
        mean = tl.where(total > 1e-20, mean, 0.0)
        grad = tl.where(real, (grad - mean[:, None]) / tl.maximum(total, 1e-20)[:, None], 0.0)
    of_score = tl.zeros((BLOCK_T, G_PAD), tl.float32)
    for k in tl.static_range(K):
        here = (slot == k)[None, :]
        id_k = tl.sum(tl.where(here & real, raw + 1, 0), 1) - 1
        grad_k = tl.sum(tl.where(here, grad, 0.0), 1)
        of_score += tl.where(group[None, :] == id_k[:, None], grad_k[:, None], 0.0)
    if SUMS:
        of_share = tl.load(grad_share_ptr + group, mask=group < G, other=0.0)[None, :]
        if SOFTMAX:
            of_score += of_share
        else:
            total = tl.maximum(tl.sum(score, 1), 1e-20)[:, None]
            mean = tl.sum(of_share * score, 1)[:, None] / total
            of_score += (of_share - mean) / total
    if SOFTMAX:
        out = score * (of_score - tl.sum(score * of_score, 1)[:, None])
    else:
        out = score * (1.0 - score) * of_score
    if SUMS:
        if SOFTMAX:
            share = score
        else:
            share, log_total = _softmax(logits, live)
        out += (2.0 * tl.load(grad_z_ptr)) * log_total[:, None] * share
    inside = live[:, None] & (group < G)[None, :]
    out_at = token.to(tl.int64)[:, None] * G + group[None, :]
    tl.store(grad_logits_ptr + out_at, out.to(grad_logits_ptr.dtype.element_ty), mask=inside)


@dataclass(frozen=True, slots=True)
class Rule:
    """How a gate decides and weighs; see `gate_op.gate`."""

    experts: int
    score: str
    renormalise: bool
    expert_groups: int = 1
    top_groups: int = 1


def _padded(G: int) -> int:
    """A power of two, of whole fours."""
    return max(4, next_power_of_2(G))


def block_of(T: int, G: int) -> tuple[int, int]:
    """Tokens of a block, at most one for each bit of an int, and warps; measured on an H100."""
    pad = _padded(G)
    if T == 1:
        return 1, 1
    if T <= 4096:  # few tokens while there are too few blocks to fill a GPU
        return max(1, min(8, 2048 // pad)), 4
    warps = 2 if pad <= 128 else 4  # sixteen logits a thread
    return max(1, min(32, 512 * warps // pad)), warps


@dataclass(frozen=True, slots=True)
class Gated:
    """What the gate's launch leaves for the scan.

    Attributes:
        raw_TK: int32 choices, ids >= experts are null.
        weight_TK: fp32.
        rank_TK: int32, earlier tokens of the block in the same group.
        load_GN: int32, choices of each group by block of tokens.
        share_GN, z_N: fp32 partial sums, empty if not asked for; `sums` says whether.
        block: tokens of a block.
        plan: over the experts, if there was one block; else `planning` makes it.
    """

    raw_TK: Tensor
    weight_TK: Tensor
    rank_TK: Tensor
    load_GN: Tensor
    share_GN: Tensor
    z_N: Tensor
    sums: bool
    block: int
    plan: tuple[Tensor, Tensor, Tensor, Tensor] | None


def gate(
    logits_TG: Tensor,
    k: int,
    rule: Rule,
    *,
    bias_E: Tensor | None = None,
    given_TK: Tensor | None = None,
    sums: bool = False,
) -> Gated:
    """Decide, weigh and count; with `given_TK` nothing is decided."""
    logits_TG, (T, G) = logits_TG.contiguous(), logits_TG.shape
    block, warps = block_of(T, G)
    blocks = ceil_div(T, block)

    def ints(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=logits_TG.device)

    def floats(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=logits_TG.device)

    raw_TK = ints(T, k) if given_TK is None else given_TK.contiguous()
    made = 0 if given_TK is not None else blocks
    plan = None
    if made == 1:
        plan = ints(T * k), ints(T * k), ints(rule.experts + 1), ints(T, k)
    out = Gated(
        raw_TK, floats(T, k), ints(T if made else 0, k), ints(G, made),
        floats(G, blocks if sums else 0), floats(blocks if sums else 0), sums,
        block, plan,
    )  # fmt: skip
    if T:
        launch(
            _gate_kernel, (blocks,),
            logits_TG, logits_TG if bias_E is None else bias_E,
            out.raw_TK, out.weight_TK, out.rank_TK, out.load_GN, out.share_GN, out.z_N,
            *(plan or [raw_TK] * 4), T, G, rule.experts, blocks,
            K=k, K_PAD=next_power_of_2(k), G_PAD=_padded(G), BLOCK_T=block,
            SOFTMAX=rule.score == "softmax", BIASED=bias_E is not None,
            RENORMALISE=rule.renormalise, GROUPS=rule.expert_groups, TOP_GROUPS=rule.top_groups,
            GIVEN=given_TK is not None, SUMS=sums, ALONE=plan is not None, num_warps=warps,
        )  # fmt: skip
    return out


def gate_backward(
    grad_TK: Tensor,
    grad_G: Tensor | None,
    grad_z: Tensor | None,
    logits_TG: Tensor,
    raw_TK: Tensor,
    rule: Rule,
) -> Tensor:
    """`reference.gate_backward`: (T, G) of the logits' dtype; both sums' gradients or none."""
    logits_TG, raw_TK, (T, G) = logits_TG.contiguous(), raw_TK.contiguous(), logits_TG.shape
    K, (block, warps) = raw_TK.size(1), block_of(T, G)
    out = torch.empty_like(logits_TG)
    sums = grad_G is not None and grad_z is not None
    grad_TK = grad_TK.contiguous()
    grad_G, grad_z = (grad_TK if g is None else g.contiguous() for g in (grad_G, grad_z))
    if T and G:
        launch(
            _gate_backward_kernel, (ceil_div(T, block),),
            logits_TG, raw_TK, grad_TK, grad_G, grad_z, out, T, G, rule.experts,
            K=K, K_PAD=next_power_of_2(K), G_PAD=_padded(G), BLOCK_T=block,
            SOFTMAX=rule.score == "softmax", RENORMALISE=rule.renormalise, SUMS=sums,
            num_warps=warps,
        )  # fmt: skip
    return out
