"""Attention to chosen key blocks as one torch operation."""

from typing import Any

import torch
from torch import Tensor

from moe_router_kernels.choose import uses_triton
from moe_router_kernels.plan_op import plan_from_ids, said
from moe_router_kernels.reference_attention import attend_blocks as plain


@torch.library.custom_op("moe_router::attend_blocks", mutates_args=())
def _attend(
    q_THd: Tensor,
    k_TJd: Tensor,
    v_TJd: Tensor,
    first_N: Tensor,
    last_N: Tensor,
    target_NJK: Tensor,
    unit_R: Tensor,
    offsets_G1: Tensor,
    block: int,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    from moe_router_kernels import block_attention

    return block_attention.forward(q_THd, k_TJd, v_TJd, first_N, last_N, target_NJK, block, causal)


@torch.library.custom_op("moe_router::attend_blocks_backward", mutates_args=())
def _attend_backward(
    grad_THd: Tensor,
    q_THd: Tensor,
    k_TJd: Tensor,
    v_TJd: Tensor,
    first_N: Tensor,
    last_N: Tensor,
    target_NJK: Tensor,
    unit_R: Tensor,
    offsets_G1: Tensor,
    out_THd: Tensor,
    lse_TH: Tensor,
    block: int,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from moe_router_kernels import block_attention

    lists = (first_N, last_N, target_NJK, unit_R, offsets_G1)
    return block_attention.backward(
        grad_THd, q_THd, k_TJd, v_TJd, *lists, out_THd, lse_TH, block, causal
    )


@_attend.register_fake
def _(q_THd: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q_THd), q_THd.new_empty(q_THd.shape[:2], dtype=torch.float32)


@_attend_backward.register_fake
def _(
    grad_THd: Tensor, q_THd: Tensor, k_TJd: Tensor, v_TJd: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q_THd), torch.empty_like(k_TJd), torch.empty_like(v_TJd)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.block, ctx.causal = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad_THd: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    grads = _attend_backward(grad_THd, *ctx.saved_tensors, ctx.block, ctx.causal)
    return *grads, *[None] * 7


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
    causal: bool = True,
    kernels: str = "auto",
) -> Tensor:
    """`reference_attention.attend_blocks`, differentiable; only the chosen pairs are computed.

    Args:
        q_THd, k_TJd, v_TJd: packed queries, keys, values; H a multiple of J.
        first_N, last_N: int32, where each block begins and ends; none is longer than `block`.
        target_NJK: int32, distinct key blocks of each (query block, KV head); -1 is none.
        kernels: see `choose.uses_triton`.

    Returns:
        (T, H, d); 0 for a query without a key.

    Raises:
        ValueError: shapes that do not fit.
    """
    (T, H, d), (N, J, K) = q_THd.shape, target_NJK.shape
    if k_TJd.shape != (T, J, d) or v_TJd.shape != k_TJd.shape or H % max(J, 1):
        raise ValueError(
            f"attend_blocks: keys {said(k_TJd)}, values {said(v_TJd)}: want ({T}, {J}, {d}) for "
            f"queries {said(q_THd)} and a choice for {J} KV heads"
        )
    uncovered = ""
    if d not in (16, 32, 64, 128, 256) or block not in (16, 32, 64, 128):
        uncovered = f"heads of {d} channels, blocks of {block}: no powers of two up to 256 and 128"
    if q_THd.dtype == torch.float64:
        uncovered = "fp64"
    if not uses_triton("attention", kernels, q_THd.device, uncovered):
        return plain(q_THd, k_TJd, v_TJd, first_N, last_N, target_NJK, causal)
    heads_J = torch.arange(J, device=target_NJK.device, dtype=torch.int32)
    group_NJK = torch.where(target_NJK < 0, -1, target_NJK * J + heads_J[:, None])
    unit_R, _, offsets_G1, _ = plan_from_ids(group_NJK.view(N * J, K), N * J, kernels)
    lists = (first_N, last_N, target_NJK.contiguous(), unit_R, offsets_G1)
    out: Tensor = _attend(q_THd, k_TJd, v_TJd, *lists, block, causal)[0]
    return out
