"""The machine that a simulation asks about: one YAML file, strict as a run's config."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from moe_router.config_file import read_section
from moe_router.dispatch.cost_model import Link
from moe_router.errors import require
from moe_router.placement import Placement


@dataclass(frozen=True, kw_only=True, slots=True)
class RatesConfig:
    """Bytes per second inside a machine, as `moe-router doctor --links` measures them."""

    all_to_all: float  # that leave a rank
    all_gather: float  # that reach it
    reduce_scatter: float  # that leave it
    gather: float  # of rows that it copies inside its memory
    combine: float  # of rows that it sums there
    plan: float  # of int32 ids that it sorts
    put: float | None = None  # into the memory of others; null: out of reach


@dataclass(frozen=True, kw_only=True, slots=True)
class FixedConfig:
    """Seconds of a round trip of one token: launches, counts, waits."""

    all_to_all: float
    padded: float
    gather_scatter: float
    peer_memory: float | None = None  # null: out of reach


@dataclass(frozen=True, kw_only=True, slots=True)
class Topology:
    ranks: int
    rates: RatesConfig
    fixed_s: FixedConfig
    expert_row_s: float  # one row through one expert, forward and backward
    rest_token_s: float  # all else that a step takes for one token of a rank
    per_node: int | None = None  # ranks of a machine; null: all of them
    far_bytes_per_s: float | None = None  # that leave a rank for other machines
    message_s: float = 0.0  # of each message to a rank of another machine
    transport: Literal["auto", "all_to_all", "padded", "gather_scatter", "peer_memory"] = "auto"
    placement: Literal["contiguous", "balanced"] = "contiguous"
    experts_of_rank: tuple[tuple[int, ...], ...] | None = None  # a placement of your own
    spare: int = 0  # slots of a rank beyond its share, for copies
    capacity_factor: float | None = None  # rows of an expert from one rank, times the mean
    row_bound: float = 2.0  # rows of a static transport, times the mean
    tokens: int | None = None  # of a rank in a micro-step; null: the recorded ones, shared out

    def __post_init__(self) -> None:
        require(self.ranks >= 1, "ranks", self.ranks, "at least 1")
        node = self.per_node or self.ranks
        fits = node >= 1 and (node >= self.ranks or self.ranks % node == 0)
        require(fits, "per_node", node, f"a divisor of {self.ranks} (ranks)")
        far, several = self.far_bytes_per_s, node < self.ranks
        require(not several or far is not None, "far_bytes_per_s", far, "a rate between machines")
        given = [*asdict(self.rates).values(), far, self.tokens, self.capacity_factor]
        for value in given:
            require(value is None or value > 0, "rates, tokens, capacity_factor", value, "above 0")
        for key in ("expert_row_s", "rest_token_s", "message_s"):
            require(getattr(self, key) >= 0, key, getattr(self, key), "0 seconds or more")
        require(self.spare >= 0, "spare", self.spare, "0 slots or more")
        require(self.row_bound >= 1, "row_bound", self.row_bound, "at least 1, the mean")
        own = self.experts_of_rank
        alike = own is None or len(own) == self.ranks
        require(alike, "experts_of_rank", len(own or ()), f"a list for each of {self.ranks} ranks")

    @property
    def link(self) -> Link:
        rates, fixed = (
            {name: number for name, number in asdict(part).items() if number is not None}
            for part in (self.rates, self.fixed_s)
        )
        if self.rates.put is None:
            fixed.pop("peer_memory", None)
        far = math.inf if self.far_bytes_per_s is None else self.far_bytes_per_s
        return Link(self.ranks, "any", rates, fixed, self.per_node, far, self.message_s)

    def place(self, load_E: Sequence[float]) -> Placement:
        """Where experts of such a load are."""
        experts = len(load_E)
        if self.experts_of_rank is not None:
            own = Placement(self.experts_of_rank)
            require(own.experts == experts, "experts_of_rank", own.experts, f"{experts} experts")
            return own
        slots = min(experts, -(-experts // self.ranks) + self.spare)
        if self.placement == "balanced":
            return Placement.balanced(load_E, self.ranks, slots)
        if self.spare:
            return Placement.dealt(experts, self.ranks, slots)
        return Placement.contiguous(experts, self.ranks)


def load_topology(path: Path, overrides: Sequence[str] = ()) -> Topology:
    """Read a topology.

    Args:
        overrides: "a.b=value", later ones win: a what-if.

    Raises:
        ConfigError: the first thing that is wrong, in one line that starts with the file.
    """
    return read_section(path, Topology, overrides)
