"""From hidden states to logits, one per group, in fp32."""

import logging
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_router.config import RouterKind
from moe_router_kernels import linear_op, reference
from moe_router_kernels.choose import constant_while_tracing

_log = logging.getLogger(__name__)


class LinearScore(nn.Module):
    """logits = W x."""

    def __init__(self, dim: int, groups: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(groups, dim) * dim**-0.5)

    def forward(self, x_TD: Tensor, position_T: Tensor) -> Tensor:
        half = x_TD.is_cuda and x_TD.dtype == self.weight.dtype and x_TD.dtype.itemsize == 2
        if half and not torch.is_grad_enabled() and x_TD.size(0) == 1:
            return linear_op.linears(x_TD, [self.weight], dtype=torch.float32)[0]
        if half and not torch.is_grad_enabled() and _widens(x_TD.dtype):
            # products of 16-bit numbers are exact in fp32: the same sums, without two casts
            return _widening_mm(x_TD, self.weight.mT)
        return _linear(reference.wide(x_TD), self.weight)


def _linear(x_TD: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """In the dtype of x_TD, which is fp32 or more: a model in fp64 may have routers in fp32."""
    return F.linear(x_TD, weight.to(x_TD.dtype), None if bias is None else bias.to(x_TD.dtype))


def _widening_mm(a: Tensor, b: Tensor) -> Tensor:
    multiply: Any = torch.mm
    out: Tensor = multiply(a, b, out_dtype=torch.float32)
    return out


@constant_while_tracing
def _widens(dtype: torch.dtype) -> bool:
    return _widens_here(dtype)


@cache
def _widens_here(dtype: torch.dtype) -> bool:
    """Whether this torch, on this GPU, multiplies 16 bit into fp32."""
    tile = torch.ones(16, 16, device="cuda", dtype=dtype)
    try:
        return bool((_widening_mm(tile, tile) == 16).all())
    except (TypeError, RuntimeError) as problem:
        _log.info("routers cast what they score: %s", str(problem).splitlines()[0])
        return False


class MLPScore(nn.Module):
    """logits = W2 gelu(W1 x + b1)."""

    def __init__(self, dim: int, hidden: int, groups: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, hidden)
        self.weight = nn.Parameter(torch.randn(groups, hidden) * hidden**-0.5)

    def forward(self, x_TD: Tensor, position_T: Tensor) -> Tensor:
        hidden_TH = _linear(reference.wide(x_TD), self.up.weight, self.up.bias)
        return _linear(F.gelu(hidden_TH), self.weight)


class PositionScore(nn.Module):
    """logits = W (sines and cosines of the position): the control that sees no content."""

    def __init__(self, features: int, groups: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(groups, 2 * features) * features**-0.5)

    def forward(self, x_TD: Tensor, position_T: Tensor) -> Tensor:
        features, dtype = self.weight.size(1) // 2, reference.wide(x_TD).dtype
        octave_F = torch.arange(features, device=x_TD.device, dtype=dtype) / features
        angle_TF = position_T[:, None] * 10000.0**-octave_F
        return _linear(torch.cat([angle_TF.sin(), angle_TF.cos()], -1), self.weight)


def make_score(
    dim: int, groups: int, kind: RouterKind, hidden: int
) -> LinearScore | MLPScore | PositionScore:
    """The module that `kind` names; hidden: width of the mlp, or features of the position."""
    match kind:
        case "linear":
            return LinearScore(dim, groups)
        case "mlp":
            return MLPScore(dim, hidden, groups)
        case "position":
            return PositionScore(hidden, groups)
