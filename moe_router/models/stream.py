"""The tokens that blocks compute, and what goes with them when some stay behind."""

from dataclasses import dataclass

from torch import Tensor

from moe_router.models.packing import Packing
from moe_router.models.rope import Turn
from moe_router.routing.depth import Kept
from moe_router.types import Tokens
from moe_router_kernels import gather


@dataclass(frozen=True, slots=True)
class Stream:
    """Attributes:
    x_TD: the residual stream.
    position_T: int32, in the sequence, whoever has left it.
    turn: of the positions.
    packing: of the sequences, as they are now.
    size_T: fp32 mass of each token; None is one each.
    """

    x_TD: Tensor
    position_T: Tensor
    turn: Turn
    packing: Packing
    size_T: Tensor | None = None

    @property
    def tokens(self) -> Tokens:
        return Tokens(self.x_TD, self.position_T, self.packing.offsets_B1, self.size_T)

    def take(self, kept: Kept) -> "Stream":
        """Only the kept tokens; gradients of x_TD flow back to where they came from."""
        src_R = kept.plan.src_R
        size_R = None if self.size_T is None else self.size_T[src_R]
        return self.at(kept, gather(self.x_TD, src_R, kept.plan.row_TK), size_R)

    def at(self, kept: Kept, x_RD: Tensor, size_R: Tensor | None) -> "Stream":
        """Other states in the places of the kept tokens."""
        src_R = kept.plan.src_R
        return Stream(
            x_TD=x_RD,
            position_T=self.position_T[src_R],
            turn=Turn(self.turn.cos_T1C[src_R], self.turn.sin_T1C[src_R]),
            packing=self._packing(kept, x_RD),
            size_T=size_R,
        )

    def _packing(self, kept: Kept, x_RD: Tensor) -> Packing:
        causal, bounds_B1 = self.packing.causal, kept.plan.offsets_G1
        if kept.bounded:
            return Packing.bounded(bounds_B1, len(x_RD), self.packing.longest, causal=causal)
        return Packing(bounds_B1, x_RD.device, lengths=kept.lengths, causal=causal)
