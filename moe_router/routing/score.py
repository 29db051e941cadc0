"""From hidden states to logits, one per group, in fp32."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_router.config import RouterConfig


class LinearScore(nn.Module):
    """logits = W x."""

    def __init__(self, dim: int, groups: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(groups, dim) * dim**-0.5)

    def forward(self, x_TD: Tensor) -> Tensor:
        return F.linear(x_TD, self.weight)


class MLPScore(nn.Module):
    """logits = W2 gelu(W1 x + b1)."""

    def __init__(self, dim: int, hidden: int, groups: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, hidden)
        self.weight = nn.Parameter(torch.randn(groups, hidden) * hidden**-0.5)

    def forward(self, x_TD: Tensor) -> Tensor:
        return F.linear(F.gelu(self.up(x_TD)), self.weight)


def make_score(dim: int, config: RouterConfig) -> LinearScore | MLPScore:
    groups = config.experts + config.null_experts
    if config.router == "linear":
        return LinearScore(dim, groups)
    return MLPScore(dim, config.router_hidden, groups)
