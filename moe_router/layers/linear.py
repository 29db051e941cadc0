"""Linear layers without bias, of all tokens or of those that are kept."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moe_router_kernels import kept_op, linear_op


def linear_of_kept(layer: nn.Linear, x_TD: Tensor, kept_T: Tensor | None) -> Tensor:
    """One layer; see `linears_of_kept`."""
    return linears_of_kept((layer,), x_TD, kept_T)[0]


def linears_of_kept(
    layers: Sequence[nn.Linear], x_TD: Tensor, kept_T: Tensor | None
) -> list[Tensor]:
    """Layers that read the same tokens; nothing is computed for tokens that are not kept, in no
    gradient's way.

    Args:
        layers: three at most.
        kept_T: bool, on the device; None: all are.
    """
    if kept_T is not None:
        return [kept_op.linear_of_kept(x_TD, x.weight.to(x_TD.dtype), kept_T) for x in layers]
    if is_one(x_TD, *(layer.weight for layer in layers)):
        return linear_op.linears(x_TD, [layer.weight for layer in layers])
    return [layer(x_TD) for layer in layers]


def is_one(x_TD: Tensor, *weights: Tensor) -> bool:
    """Whether one token is decoded in 16 bit on a GPU: its layers are vectors times matrices."""
    half = x_TD.is_cuda and x_TD.dtype.itemsize == 2 and x_TD.size(0) == 1
    return half and not torch.is_grad_enabled() and all(w.dtype == x_TD.dtype for w in weights)
