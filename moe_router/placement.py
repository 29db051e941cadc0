"""Which rank holds which expert, or a copy of it."""

from collections.abc import Sequence
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

    @classmethod
    def dealt(cls, experts: int, ranks: int, slots: int) -> "Placement":
        """Each rank holds the next `slots` experts in order, from 0 again after the last: that is
        `contiguous` where all slots are needed; the others hold copies.

        Raises:
            ConfigError: an expert would find no slot, or a rank hold one twice.
        """
        fewest = -(-experts // ranks)
        if not fewest <= slots <= experts:
            raise ConfigError(
                f"{slots} slots on each of {ranks} ranks: want {fewest} to {experts}, for "
                f"{experts} experts"
            )
        firsts = [rank * slots for rank in range(ranks)]
        return cls(tuple(tuple((a + i) % experts for i in range(slots)) for a in firsts))

    @classmethod
    def balanced(cls, load_E: Sequence[float], ranks: int, slots: int) -> "Placement":
        """Every spare slot gets a copy of the expert that is then the heaviest for each of its
        copies; copies are packed on the lightest ranks. Never worse than `dealt`.

        Args:
            load_E: of each expert, in any unit, 0 or more.
            slots: of each rank; all are used.

        Source: DeepSeek's expert-parallel load balancer, arXiv:2412.19437, 3.4. Not covered: its
        groups of experts on one node.
        """
        plain = cls.dealt(len(load_E), ranks, slots)
        copies_E = _numbers_of_copies(load_E, ranks, ranks * slots)
        packed = cls(_pack(load_E, copies_E, ranks, slots))
        return min(plain, packed, key=lambda placement: max(placement.load_of_ranks(load_E)))

    def load_of_ranks(self, load_E: Sequence[float]) -> list[float]:
        """What comes to each rank, where copies share evenly."""
        share_E = [load / len(of) for load, of in zip(load_E, self.copies(), strict=True)]
        return [sum(share_E[expert] for expert in held) for held in self.experts_of_rank]

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


def _numbers_of_copies(load_E: Sequence[float], ranks: int, slots: int) -> list[int]:
    """At least one of each expert, at most one a rank, `slots` of all."""
    copies_E = [1] * len(load_E)
    for _ in range(slots - len(load_E)):
        may = [expert for expert, copies in enumerate(copies_E) if copies < ranks]
        copies_E[max(may, key=lambda expert: load_E[expert] / copies_E[expert])] += 1
    return copies_E


def _pack(
    load_E: Sequence[float], copies_E: Sequence[int], ranks: int, slots: int
) -> tuple[tuple[int, ...], ...]:
    """Heaviest copies first, each to the lightest rank that has room.

    Experts of several copies come before those of one, and to the ranks with the most room: room
    then differs by one slot at most, so that copies always find ranks enough, whatever the loads.
    """
    held: list[list[int]] = [[] for _ in range(ranks)]
    load_W = [0.0] * ranks
    share_E = [load / copies for load, copies in zip(load_E, copies_E, strict=True)]
    for expert in sorted(range(len(load_E)), key=lambda e: (copies_E[e] == 1, -share_E[e])):
        copies = copies_E[expert]
        if copies > 1:
            order = sorted(range(ranks), key=lambda rank: (len(held[rank]), load_W[rank]))
        else:
            free = (rank for rank in range(ranks) if len(held[rank]) < slots)
            order = sorted(free, key=lambda rank: load_W[rank])
        for rank in order[:copies]:
            held[rank].append(expert)
            load_W[rank] += share_E[expert]
    return tuple(tuple(experts) for experts in held)
