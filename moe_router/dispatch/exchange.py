"""Rows to each rank and back by one collective, differentiable: the reverse is the gradient."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_router.dispatch.base import Group


def exchange(x: Tensor, send: list[int], receive: list[int], group: Group) -> Tensor:
    """Rows to each rank out, rows from each rank in; no gradient."""
    out = x.new_empty((sum(receive), *x.shape[1:]))
    dist.all_to_all_single(out, x.contiguous(), receive, send, group=group)
    return out


def pack(weight_RK: Tensor, id_RK: Tensor) -> Tensor:
    """Weights and ids as one int32 message; fp64 weights take two columns each."""
    return torch.cat([weight_RK.contiguous().view(torch.int32), id_RK], 1)


def unpack(packed: Tensor, dtype: torch.dtype, K: int) -> tuple[Tensor, Tensor]:
    """(N, K) weights of `dtype` and (N, K) int32 ids from what `pack` made."""
    bits, id_NK = torch.split(packed, [packed.size(1) - K, K], 1)
    # flat in between: a single row keeps the stride of `packed`, which no wider dtype can view
    return bits.flatten().view(dtype).view(-1, K), id_NK.contiguous()


class Send(torch.autograd.Function):
    """Rows, fp32 or fp64 weights, and ids to the experts; gradients of rows and weights return.

    One function for all three, so that every rank runs the same collectives in the same order in
    backward, also a rank without experts, on which no gradient reaches the rows.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_RD: Tensor,
        weight_RK: Tensor,
        id_RK: Tensor,
        send: list[int],
        receive: list[int],
        group: Group,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.way = (send, receive, group)
        packed = exchange(pack(weight_RK, id_RK), send, receive, group)
        weight_NK, id_NK = unpack(packed, weight_RK.dtype, id_RK.size(1))
        ctx.mark_non_differentiable(id_NK)
        return exchange(x_RD, send, receive, group), weight_NK, id_NK

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        send, receive, group = ctx.way
        grad_RD = exchange(grads[0], receive, send, group)
        return grad_RD, exchange(grads[1], receive, send, group), None, None, None, None


class Return(torch.autograd.Function):
    """Results home; their gradients go back to the experts."""

    @staticmethod
    def forward(
        ctx: Any, y_ND: Tensor, send: list[int], receive: list[int], group: Group
    ) -> Tensor:
        ctx.way = (send, receive, group)
        return exchange(y_ND, receive, send, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        send, receive, group = ctx.way
        return exchange(grads[0], send, receive, group), None, None, None
