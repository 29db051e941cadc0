"""The dense feed-forward layer: every token takes it."""

import torch.nn.functional as F
from torch import Tensor, nn

from moe_router_kernels import kept_op


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), without biases. Source: Shazeer 2020, arXiv:2002.05202."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(dim, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor, kept_T: Tensor | None = None) -> Tensor:
        """kept_T: see `linear_of_kept`."""
        gate, up = linear_of_kept(self.gate_up, x, kept_T).chunk(2, -1)
        return linear_of_kept(self.down, F.silu(gate) * up, kept_T)


def linear_of_kept(layer: nn.Linear, x_TD: Tensor, kept_T: Tensor | None) -> Tensor:
    """A layer without bias; nothing is computed for tokens that are not kept, in no gradient's way.

    Args:
        kept_T: bool, on the device; None: all are.
    """
    if kept_T is None:
        out: Tensor = layer(x_TD)
        return out
    return kept_op.linear_of_kept(x_TD, layer.weight.to(x_TD.dtype), kept_T)
