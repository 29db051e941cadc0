"""The experts one rank holds: a SwiGLU each, computed together by grouped GEMMs."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_router.config import Kernels
from moe_router_kernels import grouped_mm, reference


class Experts(nn.Module):
    """Args:
    held: experts on this rank.
    dim, hidden: D and F.
    kernels: `reference` multiplies expert by expert.
    """

    def __init__(self, held: int, dim: int, hidden: int, kernels: Kernels = "auto") -> None:
        super().__init__()
        self._multiply = reference.grouped_mm if kernels == "reference" else grouped_mm
        self.gate_up = nn.Parameter(torch.randn(held, dim, 2 * hidden) * dim**-0.5)
        self.down = nn.Parameter(torch.randn(held, hidden, dim) * hidden**-0.5)

    def forward(self, x_RD: Tensor, offsets_G1: Tensor) -> Tensor:
        """(R, D) rows sorted by expert to (R, D); computes in autocast's dtype if it is on."""
        device = x_RD.device.type
        dtype = (
            torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_RD.dtype
        )
        both_RF = self._multiply(x_RD.to(dtype), self.gate_up.to(dtype), offsets_G1)
        gate_RF, up_RF = both_RF.chunk(2, -1)
        return self._multiply(F.silu(gate_RF) * up_RF, self.down.to(dtype), offsets_G1)
