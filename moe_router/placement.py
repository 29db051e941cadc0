"""Which rank holds which expert, or a copy of it."""

from dataclasses import dataclass

from moe_router.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Placement:
    """experts_of_rank[r] are the global ids of the experts on rank r, in order of slot. An expert
    may have copies on several ranks."""

    experts_of_rank: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        twice = any(len(set(held)) < len(held) for held in self.experts_of_rank)
        known = {e for held in self.experts_of_rank for e in held}
        if twice or known != set(range(len(known))):
            raise ConfigError(
                f"placement {self.experts_of_rank}: want every expert 0..E-1 on some rank, and on "
                "none twice"
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
        return len({e for held in self.experts_of_rank for e in held})

    @property
    def ranks(self) -> int:
        return len(self.experts_of_rank)

    def copies(self) -> list[list[tuple[int, int]]]:
        """(rank, slot) of every copy of each expert, in order of rank."""
        found: list[list[tuple[int, int]]] = [[] for _ in range(self.experts)]
        for rank, held in enumerate(self.experts_of_rank):
            for slot, expert in enumerate(held):
                found[expert].append((rank, slot))
        return found

    def first_slots(self, rank: int) -> list[int]:
        """The slots of a rank that hold the first copy of their expert: what it speaks for."""
        return [slot for (owner, slot), *_ in self.copies() if owner == rank]
