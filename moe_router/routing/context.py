"""What one forward pass carries besides tokens."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from torch import Tensor

from moe_router.routing.bounds import Bounds
from moe_router.routing.ledger import Ledger
from moe_router.types import Choice, NoiseKey, Observe, Plan

Held = TypeVar("Held")


class PlanMemory:
    """Remembers a layer's decisions, so that a recomputed forward takes the same ones.

    One memory serves one routed layer of one forward pass; `Context.part` gives more of them.
    """

    def __init__(self) -> None:
        self._held: dict[str, Any] = {}

    def __len__(self) -> int:
        return len(self._held)

    def held(self, name: str) -> Any:
        """The value held under `name`; None if there is none."""
        return self._held.get(name)

    def recall(self, name: str, make: Callable[[], Held]) -> Held:
        """The value held under `name`; made and held on first use."""
        if name not in self._held:
            self._held[name] = make()
        value: Held = self._held[name]
        return value


@dataclass(frozen=True, slots=True)
class Context:
    """Attributes:
    key: names the noise of this pass.
    ledger: counts executed FLOPs, if given.
    observe: called with (layer, choice, plan) once a routed layer has planned.
    memory: set under activation checkpointing.
    step: optimizer steps before this one, for what changes in the course of training; None: it is
        over.
    shift_B: fp32, added to the logits of routers in depth, in evaluation: what each sequence may
        compute, see `training.calibrate`; None: nothing.
    bounds: of the rows of tokens that a router lets go on, without gradients; None: as many as
        there are, for which the host waits.
    """

    key: NoiseKey = field(default_factory=NoiseKey)
    ledger: Ledger | None = None
    observe: Observe | None = None
    memory: PlanMemory | None = None
    step: int | None = None
    shift_B: Tensor | None = None
    bounds: Bounds | None = None

    def held(self, name: str) -> Any:
        """What `recall` returned under `name` when this pass ran first; None in that run."""
        return None if self.memory is None else self.memory.held(name)

    def recall(self, name: str, make: Callable[[], Held]) -> Held:
        """`make()`, or what it returned when this pass ran first."""
        return make() if self.memory is None else self.memory.recall(name, make)

    def part(self, name: str) -> "Context":
        """The context of one routed part of a block that has several."""
        if self.memory is None:
            return self
        return replace(self, memory=self.memory.recall(name, PlanMemory))

    def within(self, plan: Plan) -> "Context":
        """The context of a layer that sees the rows of `plan`, one choice each: its choices are
        observed by token, -1 for those without a row."""
        observe = self.observe
        if observe is None:
            return self

        def by_token(layer: int, choice: Choice, rows: Plan) -> None:
            observe(layer, *_by_token(choice, rows, plan))

        return replace(self, observe=by_token)

    @property
    def recomputing(self) -> bool:
        return bool(self.memory)


PLAIN = Context()
"""Of a pass that nobody watches; a global, for torch.compile cannot make a Context."""


def _by_token(choice: Choice, rows: Plan, plan: Plan) -> tuple[Choice, Plan]:
    row_T = plan.row_TK[:, 0]

    def spread(value_RK: Tensor, none: int) -> Tensor:
        value_TK = value_RK.new_full((row_T.numel(), value_RK.size(1)), none)
        value_TK[plan.src_R] = value_RK
        return value_TK

    target_TK, row_TK = spread(choice.target_TK, -1), spread(rows.row_TK, -1)
    weight_TK = spread(choice.weight_TK.detach(), 0)
    return Choice(target_TK, weight_TK), replace(rows, row_TK=row_TK)
