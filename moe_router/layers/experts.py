"""The experts one rank holds: a SwiGLU each, computed together by grouped GEMMs."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_router.config import Kernels
from moe_router.types import Choice, Plan
from moe_router_kernels import (
    combine,
    expert_mlp,
    gather,
    grouped_mm,
    reference,
    runs_expert_mlp,
)


class Experts(nn.Module):
    """Args:
    held: experts on this rank.
    dim, hidden: D and F.
    kernels: `reference` multiplies expert by expert; `auto` fuses on a GPU in 16 bit.
    """

    def __init__(self, held: int, dim: int, hidden: int, kernels: Kernels = "auto") -> None:
        super().__init__()
        self.kernels = kernels
        # (out, in) as in a linear layer, gate before up: also how Hugging Face stores experts
        self.gate_up = nn.Parameter(torch.randn(held, 2 * hidden, dim) * dim**-0.5)
        self.down = nn.Parameter(torch.randn(held, dim, hidden) * hidden**-0.5)

    def forward(self, x_ND: Tensor, choice: Choice, plan: Plan) -> Tensor:
        """Each token's sum over its choices of weight * expert(token).

        Args:
            x_ND: tokens; computed in autocast's dtype if it is on.
            choice: of the experts here, in order.
            plan: over them.

        Returns:
            (N, D).
        """
        x_ND = autocast(x_ND)
        ways = (plan.src_R, plan.choice_R, plan.offsets_G1, plan.row_TK)
        if runs_expert_mlp(self.kernels, x_ND, self.gate_up):
            return expert_mlp(x_ND, choice.weight_TK, self.gate_up, self.down, *ways)
        rows_RD = gather(x_ND, plan.src_R, plan.row_TK)
        y_RD = self._rows(rows_RD, plan.offsets_G1)
        return combine(y_RD, choice.weight_TK, plan.src_R, plan.choice_R, plan.row_TK)

    def _rows(self, x_RD: Tensor, offsets_G1: Tensor) -> Tensor:
        """(R, D) rows sorted by expert to (R, D)."""
        multiply = reference.grouped_mm if self.kernels == "reference" else grouped_mm
        gate_up, down = (w.to(x_RD.dtype).mT for w in (self.gate_up, self.down))
        gate_RF, up_RF = multiply(x_RD, gate_up, offsets_G1).chunk(2, -1)
        return multiply(F.silu(gate_RF) * up_RF, down, offsets_G1)


def autocast(x: Tensor) -> Tensor:
    """In autocast's dtype, if it is on."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x
