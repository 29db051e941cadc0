"""Which key blocks each query block attends to, as torch operations."""

from typing import Any

import torch
from torch import Tensor

from moe_router_kernels import reference_attention as plain
from moe_router_kernels.choose import uses_triton
from moe_router_kernels.operation import operation


@operation("moe_router::block_means")
def _block_means(
    x_THd: Tensor, first_N: Tensor, last_N: Tensor, kv_heads: int, block: int
) -> Tensor:
    from moe_router_kernels import block_choice

    return block_choice.block_means(x_THd, first_N, last_N, kv_heads, block)


@_block_means.register_fake
def _(x_THd: Tensor, first_N: Tensor, last_N: Tensor, kv_heads: int, block: int) -> Tensor:
    sizes = (first_N.numel(), kv_heads, x_THd.size(2))
    return x_THd.new_empty(sizes, dtype=torch.float32)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x_THd, first_N, last_N, _, _ = inputs
    ctx.shape, ctx.dtype = x_THd.shape, x_THd.dtype
    ctx.save_for_backward(first_N, last_N)


def _backward(ctx: Any, grad_NJd: Tensor) -> tuple[Tensor | None, ...]:
    first_N, last_N = ctx.saved_tensors
    (T, H, d), J = ctx.shape, grad_NJd.size(1)
    each_NJd = grad_NJd / ((last_N - first_N) * (H // max(J, 1)))[:, None, None]
    token_T = torch.arange(T, device=last_N.device, dtype=last_N.dtype)
    block_T = torch.searchsorted(last_N, token_T, right=True)
    grad_TJd = each_NJd.to(ctx.dtype)[block_T]
    grad_THd = grad_TJd[:, :, None].expand(T, J, H // max(J, 1), d).reshape(T, H, d)
    return grad_THd, None, None, None, None


_block_means.register_autograd(_backward, setup_context=_keep)


def block_means(
    x_THd: Tensor,
    first_N: Tensor,
    last_N: Tensor,
    kv_heads: int,
    block: int,
    kernels: str = "auto",
) -> Tensor:
    """`reference_attention.block_means`, differentiable.

    Args:
        first_N, last_N: int32, where each block begins and ends; they are all of T.
        block: the most tokens of one.
        kernels: see `choose.uses_triton`.
    """
    uncovered = "fp64" if x_THd.dtype == torch.float64 else ""
    if not uses_triton("block_means", kernels, x_THd.device, uncovered):
        return plain.block_means(x_THd, first_N, last_N, kv_heads)
    mean_NJd: Tensor = _block_means(x_THd, first_N, last_N, kv_heads, block)
    return mean_NJd


@operation("moe_router::choose_blocks")
def _choose_blocks(
    score_MJN: Tensor,
    own_M: Tensor,
    low_M: Tensor,
    high_M: Tensor,
    k: int,
    window: int,
    triton: bool,
) -> Tensor:
    if triton:
        from moe_router_kernels import block_choice

        return block_choice.choose_blocks(score_MJN, own_M, low_M, high_M, k, window)
    return plain.choose_blocks(score_MJN, own_M, low_M, high_M, k, window)


@_choose_blocks.register_fake
def _(score_MJN: Tensor, own_M: Tensor, low_M: Tensor, high_M: Tensor, k: int, *_: Any) -> Tensor:
    return score_MJN.new_empty((*score_MJN.shape[:2], k), dtype=torch.int32)


def choose_blocks(
    score_MJN: Tensor,
    own_M: Tensor,
    low_M: Tensor,
    high_M: Tensor,
    k: int,
    window: int = 0,
    kernels: str = "auto",
) -> Tensor:
    """`reference_attention.choose_blocks`; ids, so no gradient."""
    N = score_MJN.size(2)
    uncovered = "fp64" if score_MJN.dtype == torch.float64 else ""
    if N > 8192:
        uncovered = f"{N} blocks: more than 8192"
    triton = uses_triton("choose_blocks", kernels, score_MJN.device, uncovered)
    bounds = (own_M, low_M, high_M)
    target_MJK: Tensor = _choose_blocks(score_MJN.detach(), *bounds, k, window, triton)
    return target_MJK


@operation("moe_router::route_blocks")
def _route_blocks(
    q_THd: Tensor,
    k_TJd: Tensor,
    first_N: Tensor,
    last_N: Tensor,
    own_N: Tensor,
    low_N: Tensor,
    high_N: Tensor,
    block: int,
    k: int,
    window: int,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    from moe_router_kernels import block_choice

    bounds = (first_N, last_N, own_N, low_N, high_N)
    return block_choice.route_blocks(q_THd, k_TJd, *bounds, block, k, window, causal)


@_route_blocks.register_fake
def _(q_THd: Tensor, k_TJd: Tensor, first_N: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    sizes = (first_N.numel(), k_TJd.size(1))
    return first_N.new_empty((*sizes, rest[5])), first_N.new_empty((*sizes, 2))


def route_blocks(
    q_THd: Tensor,
    k_TJd: Tensor,
    first_N: Tensor,
    last_N: Tensor,
    own_N: Tensor,
    low_N: Tensor,
    high_N: Tensor,
    block: int,
    k: int,
    window: int = 0,
    *,
    causal: bool = True,
    kernels: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`reference_attention.route_blocks`; ids, so no gradient.

    Args:
        q_THd, k_TJd: packed queries and keys; H a multiple of J.
        kernels: see `choose.uses_triton`.
    """
    uncovered = "fp64" if q_THd.dtype == torch.float64 else ""
    if first_N.numel() > 8192:
        uncovered = f"{first_N.numel()} blocks: more than 8192"
    tensors = (q_THd.detach(), k_TJd.detach(), first_N, last_N, own_N, low_N, high_N)
    if not uses_triton("route_blocks", kernels, q_THd.device, uncovered):
        return plain.route_blocks(*tensors, block, k, window, causal)
    chosen: tuple[Tensor, Tensor] = _route_blocks(*tensors, block, k, window, causal)
    return chosen
