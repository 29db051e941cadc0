"""From hidden states to logits, one per group, in fp32."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_router.config import RouterKind
from moe_router_kernels import reference


class LinearScore(nn.Module):
    """logits = W x."""

    def __init__(self, dim: int, groups: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(groups, dim) * dim**-0.5)

    def forward(self, x_TD: Tensor, position_T: Tensor) -> Tensor:
        return F.linear(x_TD, reference.wide(self.weight))


class MLPScore(nn.Module):
    """logits = W2 gelu(W1 x + b1)."""

    def __init__(self, dim: int, hidden: int, groups: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, hidden)
        self.weight = nn.Parameter(torch.randn(groups, hidden) * hidden**-0.5)

    def forward(self, x_TD: Tensor, position_T: Tensor) -> Tensor:
        hidden_TH = F.linear(x_TD, reference.wide(self.up.weight), reference.wide(self.up.bias))
        return F.linear(F.gelu(hidden_TH), reference.wide(self.weight))


class PositionScore(nn.Module):
    """logits = W (sines and cosines of the position): the control that sees no content."""

    def __init__(self, features: int, groups: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(groups, 2 * features) * features**-0.5)

    def forward(self, x_TD: Tensor, position_T: Tensor) -> Tensor:
        features = self.weight.size(1) // 2
        octave_F = torch.arange(features, device=x_TD.device, dtype=x_TD.dtype) / features
        angle_TF = position_T[:, None] * 10000.0**-octave_F
        return F.linear(
            torch.cat([angle_TF.sin(), angle_TF.cos()], -1), reference.wide(self.weight)
        )


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
