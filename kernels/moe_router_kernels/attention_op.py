"""Attention to chosen key blocks as one torch operation."""

import math
from typing import Any

import torch
from torch import Tensor

from moe_router_kernels.choose import uses_triton
from moe_router_kernels.gathered_attention import attend_blocks as gathered
from moe_router_kernels.operation import operation
from moe_router_kernels.plan_op import plan_from_ids, said
from moe_router_kernels.reference_attention import attend_blocks as plain


@operation("moe_router::attend_blocks")
def _attend(
    q_THd: Tensor,
    k_TJd: Tensor,
    v_TJd: Tensor,
    gate_NJK: Tensor,
    first_N: Tensor,
    last_N: Tensor,
    target_NJK: Tensor,
    count_NJ2: Tensor,
    block_R: Tensor,
    choice_R: Tensor,
    offsets_G1: Tensor,
    block: int,
    causal: bool,
    tiles: str,
) -> tuple[Tensor, Tensor]:
    from moe_router_kernels import block_attention

    lists = block_attention.Lists(first_N, last_N, target_NJK, count_NJ2, gate_NJK)
    return block_attention.forward(q_THd, k_TJd, v_TJd, lists, block, causal, tiles)


@operation("moe_router::attend_blocks_backward")
def _attend_backward(
    grad_THd: Tensor,
    grad_HT: Tensor,
    q_THd: Tensor,
    k_TJd: Tensor,
    v_TJd: Tensor,
    gate_NJK: Tensor,
    first_N: Tensor,
    last_N: Tensor,
    target_NJK: Tensor,
    count_NJ2: Tensor,
    block_R: Tensor,
    choice_R: Tensor,
    offsets_G1: Tensor,
    out_THd: Tensor,
    lse_HT: Tensor,
    block: int,
    causal: bool,
    tiles: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from moe_router_kernels import block_attention

    gate_R = gate_NJK
    if gate_NJK.numel():
        gate_R = gate_NJK.flatten()[choice_R.clamp(min=0)]
    lists = block_attention.Lists(first_N, last_N, target_NJK, count_NJ2, gate_NJK)
    groups = block_attention.Groups(block_R, gate_R, offsets_G1)
    kept = block_attention.Kept(
        grad_THd.contiguous(), grad_HT.contiguous(), q_THd, k_TJd, v_TJd, out_THd, lse_HT
    )
    how = (block, causal, tiles)
    grad_q, grad_gate, dot_HT = block_attention.grad_queries(kept, lists, *how)
    grad_k, grad_v = block_attention.grad_keys(kept, dot_HT, lists, groups, *how)
    return grad_q, grad_k, grad_v, grad_gate if gate_NJK.numel() else torch.empty_like(gate_NJK)


@_attend.register_fake
def _(q_THd: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    T, H, _d = q_THd.shape
    return torch.empty_like(q_THd), q_THd.new_empty(H, T, dtype=torch.float32)


@_attend_backward.register_fake
def _(
    grad_THd: Tensor, grad_HT: Tensor, q_THd: Tensor, k_TJd: Tensor, v_TJd: Tensor,
    gate_NJK: Tensor, *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    q, k, v, gate = (torch.empty_like(x) for x in (q_THd, k_TJd, v_TJd, gate_NJK))
    return q, k, v, gate


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.block, ctx.causal, ctx.tiles = inputs
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx: Any, grad_THd: Tensor, grad_HT: Tensor) -> tuple[Tensor | None, ...]:
    how = (ctx.block, ctx.causal, ctx.tiles)
    *grads, grad_gate = _attend_backward(grad_THd, grad_HT, *ctx.saved_tensors, *how)
    return *grads, grad_gate if ctx.needs_input_grad[3] else None, *[None] * 10


_attend.register_autograd(_backward, setup_context=_keep)


def attend_blocks(
    q_THd: Tensor,
    k_TJd: Tensor,
    v_TJd: Tensor,
    first_N: Tensor,
    last_N: Tensor,
    target_NJK: Tensor,
    block: int,
    *,
    gate_NJK: Tensor | None = None,
    count_NJ2: Tensor | None = None,
    causal: bool = True,
    kernels: str = "auto",
    tiles: str = "auto",
) -> Tensor:
    """`reference_attention.attend_blocks`, differentiable; only the chosen pairs are computed.

    Args:
        q_THd, k_TJd, v_TJd: packed queries, keys, values; H a multiple of J.
        first_N, last_N: int32, where each block begins and ends; none is longer than `block`.
        target_NJK: int32, distinct key blocks of each (query block, KV head); -1 is none.
        gate_NJK: fp32 p of each choice: what a key adds to the output is p times its share of the
            softmax, so shares sum to less than 1. None: 1.
        count_NJ2: int32, where the choices that need no mask come first: how many they are, and how
            many there are, as `block_choice_op.route_blocks` says. None: they are put in order.
        kernels: see `choose.uses_triton`.
        tiles: how the Triton kernels cut their work, `block_attention.TILES`.

    Returns:
        (T, H, d); 0 for a query without a key.

    Raises:
        ValueError: shapes that do not fit.
    """
    if kernels == "reference":
        return plain(q_THd, k_TJd, v_TJd, first_N, last_N, target_NJK, gate_NJK, causal=causal)
    lists = (first_N, last_N, target_NJK, gate_NJK, count_NJ2)
    return _execute(q_THd, k_TJd, v_TJd, *lists, block, causal, kernels, tiles)[0]


def attend_and_sum(
    q_THd: Tensor,
    k_TJd: Tensor,
    v_TJd: Tensor,
    first_N: Tensor,
    last_N: Tensor,
    target_NJK: Tensor,
    count_NJ2: Tensor,
    block: int,
    *,
    kernels: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`attend_blocks`, causal, for who attends to other keys too: also (T, H), the log of the sum
    of the exponentials of each query's scores, differentiable. Each query has a key."""
    lists = (first_N, last_N, target_NJK, None, count_NJ2)
    out, lse_HT = _execute(q_THd, k_TJd, v_TJd, *lists, block, True, kernels, "auto")
    return out, lse_HT.T * math.log(2)


def _execute(
    q_THd: Tensor,
    k_TJd: Tensor,
    v_TJd: Tensor,
    first_N: Tensor,
    last_N: Tensor,
    target_NJK: Tensor,
    gate_NJK: Tensor | None,
    count_NJ2: Tensor | None,
    block: int,
    causal: bool,
    kernels: str,
    tiles: str,
) -> tuple[Tensor, Tensor]:
    """What a query gets; and (H, T), log2 of its sum, where it has a key.

    For Triton choices are put in order, where nobody has; by key too, where somebody goes back.
    """
    (T, H, d), J = q_THd.shape, target_NJK.size(1)
    if k_TJd.shape != (T, J, d) or v_TJd.shape != k_TJd.shape or H % max(J, 1):
        raise ValueError(
            f"attend_blocks: keys {said(k_TJd)}, values {said(v_TJd)}: want ({T}, {J}, {d}) for "
            f"queries {said(q_THd)} and a choice for {J} KV heads"
        )
    if not uses_triton("attention", kernels, q_THd.device, _uncovered(q_THd, block)):
        chosen = (first_N, last_N, target_NJK, block, gate_NJK)
        return gathered(q_THd, k_TJd, v_TJd, *chosen, causal=causal)
    if count_NJ2 is None:
        easy_NJK = unmasked(first_N, last_N, target_NJK, block, causal)
        target_NJK, count_NJ2, order_NJK = by_mask(target_NJK, easy_NJK)
        gate_NJK = None if gate_NJK is None else gate_NJK.gather(-1, order_NJK)
    if gate_NJK is None:
        gate_NJK = q_THd.new_empty(0, dtype=torch.float32)
    leaves = (*(x.contiguous() for x in (q_THd, k_TJd, v_TJd)), gate_NJK)
    groups = target_NJK.new_empty(0), target_NJK.new_empty(0), target_NJK.new_empty(0)
    if torch.is_grad_enabled() and any(x.requires_grad for x in leaves):
        groups = by_key(target_NJK, count_NJ2, last_N - first_N == block, kernels)
    lists = (first_N, last_N, target_NJK, count_NJ2, *groups)
    both: tuple[Tensor, Tensor] = _attend(*leaves, *lists, block, causal, tiles)
    return both


def _uncovered(q_THd: Tensor, block: int) -> str:
    d = q_THd.size(2)
    if d not in (16, 32, 64, 128, 256) or block not in (16, 32, 64, 128):
        return f"heads of {d} channels, blocks of {block}: no powers of two up to 256 and 128"
    return "fp64" if q_THd.dtype == torch.float64 else ""


def unmasked(
    first_N: Tensor, last_N: Tensor, target_NJK: Tensor, block: int, causal: bool
) -> Tensor:
    """(N, J, K) bool: the key block is whole, and none of its keys is later than any query."""
    n = target_NJK.clamp(min=0)
    easy_NJK = (last_N - first_N == block)[n]
    if causal:
        easy_NJK &= last_N[n] <= first_N[:, None, None] + 1
    return easy_NJK & (target_NJK >= 0)


def by_mask(target_NJK: Tensor, easy_NJK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Choices that need no mask, then those that do, each in ascending order, then -1.

    Returns:
        target_NJK; (N, J, 2) int32, how many need none, and how many there are; the order.
    """
    N, none_NJK = target_NJK.size(0), target_NJK < 0
    rank_NJK = torch.where(none_NJK, 2 * N, target_NJK + N * ~easy_NJK)
    rank_NJK, order_NJK = rank_NJK.sort(-1)
    count_NJ2 = torch.stack([easy_NJK.sum(-1), (~none_NJK).sum(-1)], -1).int()
    return torch.where(rank_NJK < 2 * N, rank_NJK % max(N, 1), -1).int(), count_NJ2, order_NJK


def by_key(
    target_NJK: Tensor, count_NJ2: Tensor, whole_N: Tensor, kernels: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The Plan of the choices: block_R, choice_R and offsets_G1 of `block_attention.Groups`.

    Args:
        whole_N: bool, query blocks without a gap: for keys, a missing query needs a mask too.
    """
    N, J, K = target_NJK.shape
    heads_J1 = torch.arange(J, device=target_NJK.device, dtype=torch.int32)[:, None]
    choice_K = torch.arange(K, device=target_NJK.device)
    easy_NJK = (choice_K < count_NJ2[..., :1]) & whole_N[:, None, None]
    group_NJK = 2 * (target_NJK * J + heads_J1) + ~easy_NJK
    group_NJK = torch.where(target_NJK < 0, -1, group_NJK)
    unit_R, choice_R, offsets_G1, _ = plan_from_ids(group_NJK.view(N * J, K), 2 * N * J, kernels)
    # rows past the end stay no block, and are never read
    return unit_R // max(J, 1), choice_R, offsets_G1
