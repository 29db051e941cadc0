"""The schema of rebalancing: what `cluster.rebalance` holds in a run's config."""

from dataclasses import dataclass

from moe_router.errors import require


@dataclass(frozen=True, kw_only=True, slots=True)
class RebalanceConfig:
    """Experts move to where load is least, while training goes on."""

    every: int = 100  # steps between looks at the load; a checkpoint follows each
    spare: int = 0  # slots of an actor beyond its share of the experts, for copies of busy ones
    decay: float = 0.98  # what a step leaves of the moving average of the load

    def __post_init__(self) -> None:
        for key, holds, want in (
            ("every", self.every >= 1, "at least 1 step"),
            ("spare", self.spare >= 0, "0 or more slots"),
            ("decay", 0 <= self.decay < 1, "0 <= decay < 1"),
        ):
            require(holds, f"cluster.rebalance.{key}", getattr(self, key), want)

    def slots(self, experts: int, ranks: int) -> int:
        """Experts that each rank holds, copies included."""
        return min(experts, -(-experts // ranks) + self.spare)
