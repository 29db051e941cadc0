"""What each transport moves in a dispatch and a combine, and how long a link takes for it.

The one model of both the chooser, which expects even routing, and the simulator, which counts the
rows of a recorded one. The slowest rank counts, and so does the busier of its two directions.
Experts, the gate and the first Plan are alike for all transports and are left out.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_router.dispatch.where import slots_of_rank
from moe_router.placement import Placement
from moe_router.routing.plan import plan_from_ids
from moe_router.types import Choice, Plan

RATES = ("all_to_all", "all_gather", "reduce_scatter", "put", "gather", "combine", "plan")


@dataclass(frozen=True, slots=True)
class Link:
    """What the ranks of a machine do in a second; equal on all of them, for the slowest counts.

    Attributes:
        bytes_per_s: that leave a rank for others by `all_to_all` and `reduce_scatter`, reach it by
            `all_gather`, and are `put` into the others' memory; rows that a rank copies inside its
            own memory (`gather`) and sums there (`combine`), and int32 ids that it sorts (`plan`).
        fixed_s: what a round trip of one token takes, by transport: launches, counts, waits. A
            transport that is not in it cannot run on this link.
        per_node: ranks of a machine, where there are several; None: all ranks are on one.
        far_bytes_per_s: that leave a rank for other machines.
        message_s: of each message to a rank of another machine.
    """

    ranks: int
    device: str
    bytes_per_s: dict[str, float]
    fixed_s: dict[str, float]
    per_node: int | None = None
    far_bytes_per_s: float = math.inf
    message_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Problem:
    """Tokens T of a rank, K of E experts, W ranks, D elements of a row, bytes of an element."""

    tokens: int
    top_k: int
    experts: int
    ranks: int
    dim: int
    itemsize: int

    def __str__(self) -> str:
        bits = 8 * self.itemsize
        return f"{self.tokens}x{self.dim}, top-{self.top_k} of {self.experts}, {bits} bit"

    @property
    def placement(self) -> Placement:
        return Placement.contiguous(self.experts, self.ranks)

    @property
    def row(self) -> int:
        """Bytes of a token."""
        return self.dim * self.itemsize

    @property
    def ids(self) -> int:
        """Bytes that go with a row: an int32 slot and an fp32 weight for each choice."""
        return 8 * self.top_k

    def draw(self, device: torch.device, rank: int) -> tuple[Tensor, Choice, Plan]:
        """Random tokens and an even routing of them."""
        generator = torch.Generator(device).manual_seed(rank)
        dtype = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}[self.itemsize]
        shape = (self.tokens, self.dim)
        x_TD = torch.randn(shape, generator=generator, device=device).to(dtype)
        drawn_TE = torch.rand(self.tokens, self.experts, generator=generator, device=device)
        target_TK = drawn_TE.topk(self.top_k).indices.int()
        weight_TK = torch.full(target_TK.shape, 1 / self.top_k, device=device)
        return x_TD, Choice(target_TK, weight_TK), plan_from_ids(target_TK, self.experts)


@dataclass(frozen=True, slots=True)
class Load:
    """Rows of one layer between all ranks, fp64.

    Attributes:
        rows_WW: from each rank to each: one for each (token, rank).
        slots_WW: what a transport of static shapes has room for.
    """

    rows_WW: Tensor
    slots_WW: Tensor


def even_load(problem: Problem, factor: float) -> Load:
    """Under even routing: a token goes to a rank with a chance that its experts there make.

    Args:
        factor: see `Padded`.
    """
    T, K, E, W = problem.tokens, problem.top_k, problem.experts, problem.ranks
    placement, everything = problem.placement, max(math.comb(E, K), 1)
    chance = [1 - math.comb(E - len(held), K) / everything for held in placement.experts_of_rank]
    rows_W = T * torch.tensor(chance, dtype=torch.float64)
    slots_W = torch.tensor(slots_of_rank(T, placement, K, factor), dtype=torch.float64)
    return Load(rows_W.expand(W, W), slots_W.expand(W, W))


def seconds_by_rank(link: Link, problem: Problem, load: Load) -> dict[str, Tensor]:
    """(W,) seconds of a dispatch and a combine without gradient, by each transport it can take."""
    rate, row, ids = link.bytes_per_s, problem.row, problem.ids
    rows_WW, slots_WW = load.rows_WW, load.slots_WW
    all_WW = torch.full_like(rows_WW, problem.tokens)
    summed_W = rows_WW.sum(1) * row / rate["combine"]

    def crossing(moved_WW: Tensor, nbytes: int, way: str) -> Tensor:
        return crossing_s(link, moved_WW, nbytes, rate[way])

    def copied(rows_W: Tensor) -> Tensor:
        return rows_W * row / rate["gather"]

    def planned(moved_WW: Tensor) -> Tensor:
        """Ids are laid out for the way there, and sorted by expert of what comes."""
        return (moved_WW.sum(1) + moved_WW.sum(0)) * 4 * problem.top_k / rate["plan"]

    def by_collective(moved_WW: Tensor) -> Tensor:
        """Rows go into the message, those that stay twice through it, what came home is summed."""
        crossed_W = crossing(moved_WW, row + ids, "all_to_all")
        crossed_W = crossed_W + crossing(moved_WW.T, row, "all_to_all")
        handled_W = copied(moved_WW.sum(1) + 2 * moved_WW.diagonal()) + summed_W
        return crossed_W + handled_W + planned(moved_WW)

    def by_put() -> Tensor:
        """No message: rows go from token to slot; no empty slot out, all slots home."""
        crossed_W = crossing(rows_WW, row + ids, "put") + crossing(slots_WW.T, row, "put")
        own_W = rows_WW.diagonal() + slots_WW.diagonal()
        return crossed_W + copied(own_W) + summed_W + planned(slots_WW)

    def by_everybody() -> Tensor:
        """Nothing is laid out: every rank finds its own among the ids of all."""
        crossed_W = crossing(all_WW, row + ids, "all_gather")
        crossed_W = crossed_W + crossing(all_WW.T, row, "reduce_scatter")
        ids_W = all_WW.sum(0) * 4 * problem.top_k / rate["plan"]
        return crossed_W + copied(2 * all_WW.diagonal()) + ids_W

    ways = {
        "all_to_all": lambda: by_collective(rows_WW),
        "padded": lambda: by_collective(slots_WW),
        "gather_scatter": by_everybody,
        "peer_memory": by_put,
    }
    one_node = link.per_node is None or link.per_node >= link.ranks
    if not one_node:
        del ways["peer_memory"]  # memory of another machine is nobody's to write into
    return {name: link.fixed_s[name] + way() for name, way in ways.items() if name in link.fixed_s}


def crossing_s(link: Link, moved_WW: Tensor, nbytes: int, rate: float) -> Tensor:
    """(W,) seconds until all rows of a rank have left and arrived; links near and far work at once.

    Args:
        moved_WW: rows from each rank to each; those that stay cross nothing.
        nbytes: of a row.
        rate: bytes per second inside a machine.
    """
    W = len(moved_WW)
    node_W = torch.arange(W) // (link.per_node or W)
    same_WW = node_W[:, None] == node_W
    near_W = _busier(moved_WW * (same_WW & ~torch.eye(W, dtype=torch.bool))) * nbytes / rate
    far_W = _busier(moved_WW * ~same_WW) * nbytes / link.far_bytes_per_s
    strangers_W = _busier(((moved_WW > 0) & ~same_WW).double())
    return torch.maximum(near_W, far_W + strangers_W * link.message_s)


def _busier(moved_WW: Tensor) -> Tensor:
    return torch.maximum(moved_WW.sum(0), moved_WW.sum(1))


def predict(link: Link, problem: Problem, factor: float = 2.0) -> dict[str, float]:
    """Seconds of a dispatch and a combine by each transport, under even routing."""
    by_rank = seconds_by_rank(link, problem, even_load(problem, factor))
    return {name: float(took_W.max()) for name, took_W in by_rank.items()}


def best(seconds: dict[str, float], problem: Problem) -> str:
    """The fastest transport that sums in fp32, or on two ranks, where one sum is rounded once."""
    rounds = problem.ranks > 2 and problem.itemsize < 4
    # the collective of `gather_scatter` would round sums to 16 bit between ranks
    allowed = [name for name in seconds if not (rounds and name == "gather_scatter")]
    return min(allowed, key=seconds.__getitem__)
