"""What one forward pass carries besides tokens."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from moe_router.routing.ledger import Ledger
from moe_router.types import NoiseKey, Observe

Held = TypeVar("Held")


class PlanMemory:
    """Remembers a layer's decisions, so that a recomputed forward takes the same ones.

    One memory serves one routed layer of one forward pass.
    """

    def __init__(self) -> None:
        self._held: dict[str, Any] = {}

    def __len__(self) -> int:
        return len(self._held)

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
    """

    key: NoiseKey = field(default_factory=NoiseKey)
    ledger: Ledger | None = None
    observe: Observe | None = None
    memory: PlanMemory | None = None

    def recall(self, name: str, make: Callable[[], Held]) -> Held:
        """`make()`, or what it returned when this pass ran first."""
        return make() if self.memory is None else self.memory.recall(name, make)

    @property
    def recomputing(self) -> bool:
        return bool(self.memory)
