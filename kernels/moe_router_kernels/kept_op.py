"""Which tokens a block computes, and a linear layer for them: Triton on a GPU, else the
specification. Without gradients."""

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_router_kernels import reference
from moe_router_kernels.choose import uses_triton

MOST = 256  # tokens: beyond, those that are kept are gathered, as in training


def rms_logit(x_TD: Tensor, weight_1D: Tensor, bias: Tensor, kernels: str = "auto") -> Tensor:
    """The logit of each token by a linear router, which sees it at scale 1.

    Args:
        x_TD: any float dtype.
        weight_1D, bias: (1, D) and (1,).
        kernels: see `choose.uses_triton`.

    Returns:
        (T,) fp32, or fp64 of fp64.
    """
    uncovered = "fp64" if x_TD.dtype.itemsize == 8 else ""
    if uses_triton("logit of a router in depth", kernels, x_TD.device, uncovered):
        from moe_router_kernels import depth_gate

        eps = torch.finfo(torch.float32).eps  # of torch's rms_norm
        return depth_gate.rms_logit(x_TD.contiguous(), weight_1D, bias, eps)
    return reference.rms_logit(x_TD, weight_1D, bias)


def linear_of_kept(
    x_TK: Tensor, weight_NK: Tensor, kept_T: Tensor, kernels: str = "auto"
) -> Tensor:
    """A linear layer without bias that does nothing for the tokens that are not kept.

    Args:
        x_TK: (T, K), weight's dtype.
        weight_NK: (N, K), contiguous.
        kept_T: (T,) bool, on the device; the host never reads it.
        kernels: see `choose.uses_triton`.

    Returns:
        (T, N); 0 for the others.
    """
    uncovered = ""
    if x_TK.dtype.itemsize == 8:
        uncovered = "fp64"
    elif x_TK.size(0) > MOST:
        uncovered = f"more than {MOST} tokens"
    if uses_triton("linear of kept tokens", kernels, x_TK.device, uncovered):
        from moe_router_kernels import kept_rows

        return kept_rows.linear_of_kept(x_TK.contiguous(), weight_NK, kept_T)
    if x_TK.device.type == "cpu":  # flags can be read there
        at_R = kept_T.nonzero()[:, 0]
        none_TN = x_TK.new_zeros(x_TK.size(0), weight_NK.size(0))
        return none_TN.index_copy(0, at_R, F.linear(x_TK[at_R], weight_NK))
    return reference.linear_of_kept(x_TK, weight_NK, kept_T)
