"""What the link between ranks can do, measured once, and what each transport costs on it."""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moe_router.dispatch.base import Group
from moe_router.dispatch.exchange import exchange
from moe_router.dispatch.gather_scatter import all_gather, reduce_scatter
from moe_router.dispatch.transports import NAMES, make_transport, round_trip
from moe_router.dispatch.where import slots_of_rank
from moe_router.placement import Placement
from moe_router.routing.plan import plan_from_ids
from moe_router.types import Choice, Plan

_log = logging.getLogger(__name__)
RATES = ("all_to_all", "all_gather", "reduce_scatter", "gather", "plan")
_ROW = 4096  # bytes of a row whose rate is measured
_BYTES = {"cpu": 4 << 20, "cuda": 64 << 20}  # of each collective, from one rank


@dataclass(frozen=True, slots=True)
class Link:
    """Equal on all ranks: the slowest of them counts.

    Attributes:
        bytes_per_s: what a rank puts into `all_to_all` and `reduce_scatter`, takes out of
            `all_gather`, moves by a local `gather` of rows, and sorts by a `plan` of int32 ids.
        fixed_s: what a round trip of one token takes, by transport: launches, counts, waits.
    """

    ranks: int
    device: str
    bytes_per_s: dict[str, float]
    fixed_s: dict[str, float]


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


def slowest(run: Callable[[], object], device: torch.device, group: Group, times: int) -> float:
    """Median seconds of `run`, each time of the slowest rank; the first run is not counted."""
    samples = []
    start = torch.zeros((), device=device)
    for _ in range(times + 1):
        dist.all_reduce(start, group=group)  # all ranks begin together
        _wait(device)
        began = time.perf_counter()
        run()
        _wait(device)
        samples.append(time.perf_counter() - began)
    worst = torch.tensor(samples[1:], dtype=torch.float64, device=device)
    dist.all_reduce(worst, dist.ReduceOp.MAX, group=group)
    return float(worst.median())


def measure(device: torch.device, group: Group = None, times: int = 7) -> Link:
    """Rates and fixed costs of the group's link; all ranks must ask together."""
    ranks = dist.get_world_size(group)
    rows = _BYTES[device.type] // _ROW // ranks * ranks
    x_RD = torch.ones(rows, _ROW // 4, device=device)
    even = [rows // ranks] * ranks
    order_R = torch.arange(rows - 1, -1, -1, device=device)
    id_NK = order_R.int().repeat(x_RD.size(1) // 8)[:, None] % 64
    ways: dict[str, Callable[[], object]] = {
        "all_to_all": lambda: exchange(x_RD, even, even, group),
        "all_gather": lambda: all_gather(x_RD[: even[0]], ranks, group),
        "reduce_scatter": lambda: reduce_scatter(x_RD, ranks, group),
        "gather": lambda: x_RD[order_R],
        "plan": lambda: plan_from_ids(id_NK, 64),
    }
    nbytes = dict.fromkeys(ways, x_RD.nbytes) | {"plan": id_NK.nbytes}
    rates = {n: nbytes[n] / slowest(ways[n], device, group, times) for n in RATES}
    one = Problem(1, 1, ranks, ranks, 4, 4)
    return Link(ranks, device.type, rates, measure_transports(one, device, group, times))


def measure_transports(
    problem: Problem, device: torch.device, group: Group = None, times: int = 7, factor: float = 2.0
) -> dict[str, float]:
    """Seconds of a dispatch and a combine without gradient, by transport."""
    inputs = (*problem.draw(device, dist.get_rank(group)), problem.placement)
    took = {}
    with torch.no_grad():
        for name in NAMES:
            by = make_transport(name, problem.tokens, factor, group)
            took[name] = slowest(lambda by=by: round_trip(by, *inputs), device, group, times)  # type: ignore[misc]
    return took


def predict(link: Link, problem: Problem, factor: float = 2.0) -> dict[str, float]:
    """Seconds of a dispatch and a combine by each transport, under even routing."""
    T, W, K, E = problem.tokens, problem.ranks, problem.top_k, problem.experts
    row, ids = problem.dim * problem.itemsize, 8 * K
    held = E / W
    missed = math.prod(max(E - held - k, 0) / (E - k) for k in range(K))  # no choice on a rank
    sent = T * (1 - missed) * W
    slots = sum(slots_of_rank(T, problem.placement, K, factor))
    rate = link.bytes_per_s

    def by_rank(rows: float) -> float:
        copied = (rows + sent) * row / rate["gather"]  # into the message, and from what came home
        return rows * (2 * row + ids) / rate["all_to_all"] + copied + planned(rows)

    def planned(rows: float) -> float:
        return rows * 4 * K / rate["plan"]

    everything = T * W * (row + ids) / rate["all_gather"] + T * W * row / rate["reduce_scatter"]
    everything += planned(T * W)
    seconds = {"all_to_all": by_rank(sent), "padded": by_rank(slots), "gather_scatter": everything}
    return {name: link.fixed_s[name] + took for name, took in seconds.items()}


def choose(link: Link, problem: Problem, factor: float = 2.0) -> str:
    """The transport that is predicted to be the fastest; the log says why."""
    seconds = predict(link, problem, factor)
    if problem.ranks > 2 and problem.itemsize < 4:
        del seconds["gather_scatter"]  # its collective would round sums to 16 bit between ranks
    best = min(seconds, key=seconds.__getitem__)
    said = ", ".join(f"{name} {took * 1e6:.0f} us" for name, took in seconds.items())
    _log.info("transport %s for %s on %d ranks; predicted: %s", best, problem, link.ranks, said)
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
