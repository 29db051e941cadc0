"""The interface of every transport: rows out to the experts, results back.

`dispatch` moves each token to the ranks that hold its experts, one row per (token, rank), with the
ids and fp32 weights of its choices. The expert side makes a second Plan over what it received,
runs its experts, weights and sums the choices of a row, and `combine` brings the sums home.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor
from torch.distributed import ProcessGroup

from moe_router.placement import Placement
from moe_router.types import Choice, Plan

Group = ProcessGroup | None  # None: the default process group


@dataclass(frozen=True, slots=True)
class Received:
    """What the expert side works on.

    Attributes:
        coming_ND: `x_ND`, which may still be on its way.
        choice: target_NK are local expert slots, -1 for choices that live elsewhere.
        plan: over the local experts; gather rows of x_ND by `plan.src_R`.
        handle: what `combine` needs to find the way back; private to the transport.
        overflow: scalar on the device, not 0 where a row found no place within a static bound, or
            was lost on the way, there or back: the result must not be used. To be read after the
            backward pass. None: nothing moves.
        arrive: waits for the rows; None: they are here.
    """

    coming_ND: Tensor
    choice: Choice
    plan: Plan
    handle: Any
    overflow: Tensor | None = None
    arrive: Callable[[Tensor], Tensor] | None = None
    _here: list[Tensor] = field(default_factory=list, repr=False)

    @property
    def x_ND(self) -> Tensor:
        """Hidden states of the received tokens; N is T on one rank. Asked for as late as can be:
        rows travel until then. Where no gradient is wanted they, and the weights, may lie where
        they came: to be used before the next dispatch or combine."""
        if self.arrive is None:
            return self.coming_ND
        if not self._here:
            self._here.append(self.arrive(self.coming_ND))
        return self._here[0]


class Dispatcher(Protocol):
    rank: int
    ranks: int

    def place(self, experts: int) -> Placement:
        """Where experts are unless someone says otherwise: neighbours together."""
        return Placement.contiguous(experts, self.ranks)

    def dispatch(
        self,
        x_TD: Tensor,
        choice: Choice,
        plan: Plan,
        placement: Placement,
        first_token: int = 0,
    ) -> Received:
        """Send each token to the ranks of its experts.

        Args:
            first_token: global index of token 0: by it, copies of an expert share its tokens.
        """
        ...

    def combine(self, y_ND: Tensor, received: Received) -> Tensor:
        """Bring the weighted sums of the received tokens home, and add them up: (T, D)."""
        ...

    def total(self, x: Tensor) -> Tensor:
        """Sum over all ranks, without gradient, in a fixed order."""
        ...

    def exactly(self) -> AbstractContextManager[None]:
        """Until it ends, static bounds give way to host splits: no row can be lost."""
        return nullcontext()
