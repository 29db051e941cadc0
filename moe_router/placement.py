"""Which rank holds which expert."""

from dataclasses import dataclass

from moe_router.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Placement:
    """experts_of_rank[r] are the global ids of the experts on rank r, in order of slot."""

    experts_of_rank: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        held = sorted(e for experts in self.experts_of_rank for e in experts)
        if held != list(range(len(held))):
            raise ConfigError(
                f"placement {self.experts_of_rank}: want every expert 0..E-1 on exactly one rank"
            )

    @classmethod
    def contiguous(cls, experts: int, ranks: int) -> "Placement":
        """Neighbouring experts share a rank; the first `experts % ranks` ranks hold one more."""
        base, extra = divmod(experts, ranks)
        sizes = [base + (r < extra) for r in range(ranks)]
        starts = [sum(sizes[:r]) for r in range(ranks)]
        return cls(tuple(tuple(range(a, a + n)) for a, n in zip(starts, sizes, strict=True)))

    @property
    def experts(self) -> int:
        return sum(map(len, self.experts_of_rank))

    @property
    def ranks(self) -> int:
        return len(self.experts_of_rank)

    def rank_of_expert(self) -> list[int]:
        """Length E: the rank that holds each expert."""
        owner = {e: r for r, experts in enumerate(self.experts_of_rank) for e in experts}
        return [owner[e] for e in range(self.experts)]

    def slot_of_expert(self) -> list[int]:
        """Length E: the index of each expert inside its rank."""
        slot = {e: i for experts in self.experts_of_rank for i, e in enumerate(experts)}
        return [slot[e] for e in range(self.experts)]
