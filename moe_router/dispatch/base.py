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
class Arrived:
    """What the experts of a rank work on.

    Attributes:
        x_ND: hidden states of the received tokens; N is T on one rank.
        choice: target_NK are local expert slots, -1 for choices that live elsewhere.
        plan: over the local experts; gather rows of x_ND by `plan.src_R`.
    """

    x_ND: Tensor
    choice: Choice
    plan: Plan


@dataclass(frozen=True, slots=True)
class Received:
    """Tokens of all ranks that go to the experts of this one, and may still be on their way.

    What `Arrived` describes is asked for as late as can be: rows travel until then. Where no
    gradient is wanted they, ids and weights may lie where they came: to be used before the next
    dispatch or combine.

    Attributes:
        coming_ND: `x_ND`, whose shape is known before it is here.
        arrive: waits for what travels; called once.
        handle: what `combine` needs to find the way back; private to the transport.
        overflow: scalar on the device, not 0 where a row found no place within a static bound, or
            was lost on the way, there or back: the result must not be used. To be read after the
            backward pass. None: nothing moves.
    """

    coming_ND: Tensor
    arrive: Callable[[], Arrived]
    handle: Any
    overflow: Tensor | None = None
    _here: list[Arrived] = field(default_factory=list, repr=False)

    @property
    def here(self) -> Arrived:
        if not self._here:
            self._here.append(self.arrive())
        return self._here[0]

    @property
    def x_ND(self) -> Tensor:
        return self.here.x_ND

    @property
    def choice(self) -> Choice:
        return self.here.choice

    @property
    def plan(self) -> Plan:
        return self.here.plan


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
