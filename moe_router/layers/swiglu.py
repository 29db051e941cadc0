"""The dense feed-forward layer: every token takes it."""

import torch.nn.functional as F
from torch import Tensor, nn

from moe_router.layers.linear import linear_of_kept


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), without biases. Source: Shazeer 2020, arXiv:2002.05202."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(dim, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor, kept_T: Tensor | None = None) -> Tensor:
        """kept_T: see `layers.linear`."""
        gate, up = linear_of_kept(self.gate_up, x, kept_T).chunk(2, -1)
        return linear_of_kept(self.down, F.silu(gate) * up, kept_T)
