"""Triton: attention of query blocks to the key blocks that a router chose. Specification:
`reference_attention.attend_blocks`.

A unit is a query block and a KV head, a group is a key block and a KV head. The forward pass and
the gradient of the queries walk a unit's list of key blocks, the gradient of keys and values walks
a group's list of query blocks, which is the Plan of the same choice: no atomics, and the same sums
every time. Scores are never written; the backward pass takes them again from the log of their sum.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _load(ptr, row, keep, head, H, D: tl.constexpr):  # type: ignore[no-untyped-def]
    """(rows, D) of one head of a (T, H, D) tensor, 0 where `keep` is false."""
    at = (row.to(tl.int64)[:, None] * H + head) * D + tl.arange(0, D)[None, :]
    return tl.load(ptr + at, mask=keep[:, None], other=0.0)


@triton.jit
def _store(ptr, value, row, keep, head, H, D: tl.constexpr):  # type: ignore[no-untyped-def]
    at = (row.to(tl.int64)[:, None] * H + head) * D + tl.arange(0, D)[None, :]
    tl.store(ptr + at, value.to(ptr.dtype.element_ty), mask=keep[:, None])


@triton.jit
def _tokens(first_ptr, last_ptr, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The tokens of block n, and which of them exist."""
    token = tl.load(first_ptr + n) + tl.arange(0, BLOCK)
    return token, token < tl.load(last_ptr + n)


@triton.jit
def _allowed(row, live, column, there, CAUSAL: tl.constexpr):  # type: ignore[no-untyped-def]
    """(rows, columns): the pair exists, and the key is not later."""
    pair = live[:, None] & there[None, :]
    if CAUSAL:
        pair = pair & (column[None, :] <= row[:, None])
    return pair


@triton.jit
def _forward_kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, first_ptr, last_ptr, target_ptr, out_ptr, lse_ptr, H, J, K, scale,
    D: tl.constexpr, BLOCK: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    m, head = tl.program_id(0), tl.program_id(1)
    j = head // (H // J)
    row, live = _tokens(first_ptr, last_ptr, m, BLOCK)
    q = _load(q_ptr, row, live, head, H, D)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    acc = tl.zeros((BLOCK, D), tl.float32)
    for choice in range(0, K):
        n = tl.load(target_ptr + (m * J + j) * K + choice)
        if n >= 0:
            column, there = _tokens(first_ptr, last_ptr, n, BLOCK)
            k = _load(k_ptr, column, there, j, J, D)
            v = _load(v_ptr, column, there, j, J, D)
            score = tl.dot(q, k.T, input_precision=PRECISION) * scale
            score = tl.where(_allowed(row, live, column, there, CAUSAL), score, float("-inf"))
            higher = tl.maximum(best, tl.max(score, 1))
            # a row without a key so far has no finite maximum
            safe = tl.where(higher == float("-inf"), 0.0, higher)
            power = tl.exp(score - safe[:, None])
            fade = tl.exp(tl.where(best == float("-inf"), safe, best) - safe)
            fade = tl.where(best == float("-inf"), 0.0, fade)
            total = total * fade + tl.sum(power, 1)
            acc = acc * fade[:, None]
            acc = tl.dot(power.to(v.dtype), v, acc, input_precision=PRECISION)
            best = higher
    some = total > 0
    out = acc / tl.where(some, total, 1.0)[:, None]
    _store(out_ptr, out, row, live, head, H, D)
    log_total = tl.where(some, best + tl.log(tl.where(some, total, 1.0)), float("inf"))
    tl.store(lse_ptr + row.to(tl.int64) * H + head, log_total, mask=live)


@triton.jit
def _probabilities(  # type: ignore[no-untyped-def]
    q, k, log_total, pair, scale, PRECISION: tl.constexpr
):
    score = tl.dot(q, k.T, input_precision=PRECISION) * scale
    return tl.where(pair, tl.exp(score - log_total[:, None]), 0.0)


@triton.jit
def _queries_kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, first_ptr, last_ptr, target_ptr, lse_ptr, dot_ptr, grad_ptr, grad_q_ptr,
    H, J, K, scale,
    D: tl.constexpr, BLOCK: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    m, head = tl.program_id(0), tl.program_id(1)
    j = head // (H // J)
    row, live = _tokens(first_ptr, last_ptr, m, BLOCK)
    q = _load(q_ptr, row, live, head, H, D)
    grad = _load(grad_ptr, row, live, head, H, D)
    log_total = tl.load(lse_ptr + row.to(tl.int64) * H + head, mask=live, other=float("inf"))
    dot = tl.load(dot_ptr + row.to(tl.int64) * H + head, mask=live, other=0.0)
    acc = tl.zeros((BLOCK, D), tl.float32)
    for choice in range(0, K):
        n = tl.load(target_ptr + (m * J + j) * K + choice)
        if n >= 0:
            column, there = _tokens(first_ptr, last_ptr, n, BLOCK)
            k = _load(k_ptr, column, there, j, J, D)
            v = _load(v_ptr, column, there, j, J, D)
            pair = _allowed(row, live, column, there, CAUSAL)
            share = _probabilities(q, k, log_total, pair, scale, PRECISION)
            of_share = tl.dot(grad, v.T, input_precision=PRECISION)
            of_score = share * (of_share - dot[:, None]) * scale
            acc = tl.dot(of_score.to(k.dtype), k, acc, input_precision=PRECISION)
    _store(grad_q_ptr, acc, row, live, head, H, D)


@triton.jit
def _keys_kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, first_ptr, last_ptr, unit_ptr, offsets_ptr, lse_ptr, dot_ptr, grad_ptr,
    grad_k_ptr, grad_v_ptr, H, J, scale,
    D: tl.constexpr, BLOCK: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    n, j = tl.program_id(0), tl.program_id(1)
    column, there = _tokens(first_ptr, last_ptr, n, BLOCK)
    k = _load(k_ptr, column, there, j, J, D)
    v = _load(v_ptr, column, there, j, J, D)
    acc_k = tl.zeros((BLOCK, D), tl.float32)
    acc_v = tl.zeros((BLOCK, D), tl.float32)
    heads = H // J
    group = n * J + j
    begin, end = tl.load(offsets_ptr + group), tl.load(offsets_ptr + group + 1)
    for step in range(begin * heads, end * heads):
        m = tl.load(unit_ptr + step // heads) // J
        head = j * heads + step % heads
        row, live = _tokens(first_ptr, last_ptr, m, BLOCK)
        q = _load(q_ptr, row, live, head, H, D)
        grad = _load(grad_ptr, row, live, head, H, D)
        log_total = tl.load(lse_ptr + row.to(tl.int64) * H + head, mask=live, other=float("inf"))
        dot = tl.load(dot_ptr + row.to(tl.int64) * H + head, mask=live, other=0.0)
        pair = _allowed(row, live, column, there, CAUSAL)
        share = _probabilities(q, k, log_total, pair, scale, PRECISION)
        acc_v = tl.dot(share.to(grad.dtype).T, grad, acc_v, input_precision=PRECISION)
        of_share = tl.dot(grad, v.T, input_precision=PRECISION)
        of_score = share * (of_share - dot[:, None]) * scale
        acc_k = tl.dot(of_score.to(q.dtype).T, q, acc_k, input_precision=PRECISION)
    _store(grad_k_ptr, acc_k, column, there, j, J, D)
    _store(grad_v_ptr, acc_v, column, there, j, J, D)


def _how(q_THd: Tensor, block: int, causal: bool) -> dict[str, object]:
    precision = "ieee" if q_THd.dtype == torch.float32 else "tf32"
    return {"D": q_THd.size(2), "BLOCK": block, "CAUSAL": causal, "PRECISION": precision}


def warps(channels: int, block: int, accumulators: int) -> int:
    """Of a program; with 4 two accumulators of 64 x 128 do not fit into registers."""
    return 8 if accumulators * channels * block > 64 * 128 else 4


def forward(
    q_THd: Tensor, k_TJd: Tensor, v_TJd: Tensor, first_N: Tensor, last_N: Tensor,
    target_NJK: Tensor, block: int, causal: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(T, H, d), and fp32 (T, H): the log of the sum of the exponentials of a query's scores."""
    (T, H, d), (N, J, K) = q_THd.shape, target_NJK.shape
    q_THd, k_TJd, v_TJd = (x.contiguous() for x in (q_THd, k_TJd, v_TJd))
    scale = d**-0.5
    out, lse = torch.empty_like(q_THd), torch.empty(T, H, device=q_THd.device)
    if N and H:
        _forward_kernel[(N, H)](
            q_THd, k_TJd, v_TJd, first_N, last_N, target_NJK, out, lse, H, J, K, scale,
            **_how(q_THd, block, causal), num_warps=warps(q_THd.size(2), block, 1), num_stages=2,
        )  # fmt: skip
    return out, lse


def backward(
    grad_THd: Tensor, q_THd: Tensor, k_TJd: Tensor, v_TJd: Tensor, first_N: Tensor,
    last_N: Tensor, target_NJK: Tensor, unit_R: Tensor, offsets_G1: Tensor, out_THd: Tensor,
    lse_TH: Tensor, block: int, causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of queries, keys and values.

    Args:
        unit_R, offsets_G1: the Plan of the choice: by (key block, KV head) the units that chose it.
    """
    (_, H, d), (N, J, K) = q_THd.shape, target_NJK.shape
    grad_THd, q_THd, k_TJd, v_TJd = (x.contiguous() for x in (grad_THd, q_THd, k_TJd, v_TJd))
    scale = d**-0.5
    dot_TH = (grad_THd.float() * out_THd.float()).sum(-1)
    grads = torch.empty_like(q_THd), torch.empty_like(k_TJd), torch.empty_like(v_TJd)
    how = _how(q_THd, block, causal)
    common = (q_THd, k_TJd, v_TJd, first_N, last_N)
    if N and H:
        _queries_kernel[(N, H)](
            *common, target_NJK, lse_TH, dot_TH, grad_THd, grads[0], H, J, K, scale, **how,
            num_warps=warps(q_THd.size(2), block, 1), num_stages=2,
        )  # fmt: skip
        _keys_kernel[(N, J)](
            *common, unit_R, offsets_G1, lse_TH, dot_TH, grad_THd, *grads[1:], H, J, scale, **how,
            num_warps=warps(q_THd.size(2), block, 2), num_stages=2,
        )  # fmt: skip
    return grads
