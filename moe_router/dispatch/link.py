"""What the link between ranks can do, measured once, and the transport that is best on it."""

import logging
import platform
import time
import zlib
from collections.abc import Callable, Iterable
from functools import partial

import torch
import torch.distributed as dist

from moe_router.dispatch.base import Group
from moe_router.dispatch.cost_model import RATES, Link, Problem, best, even_load, predict
from moe_router.dispatch.exchange import Splits, exchange, gathered, sum_rows
from moe_router.dispatch.gather_scatter import all_gather, reduce_scatter
from moe_router.dispatch.peer_memory import PeerMover
from moe_router.dispatch.transports import NAMES, make_transport, round_trip
from moe_router.dispatch.where import Rows, Where, lay_out
from moe_router.errors import ConfigError
from moe_router.routing.plan import plan_from_ids

Clock = Callable[[], float]  # seconds
_log = logging.getLogger(__name__)
_ROW = 4096  # bytes of a row whose rate is measured
_BYTES = {"cpu": 4 << 20, "cuda": 64 << 20}  # of each collective, from one rank
_TIMEOUT_S = 60.0  # of a peer that does not answer


def slowest(
    run: Callable[[], object], device: torch.device, group: Group, times: int, clock: Clock
) -> float:
    """Median seconds of `run`, each time of the slowest rank; the first run is not counted."""
    samples = []
    start = torch.zeros((), device=device)
    for _ in range(times + 1):
        dist.all_reduce(start, group=group)  # all ranks begin together
        _wait(device)
        began = clock()
        run()
        _wait(device)
        samples.append(clock() - began)
    worst = torch.tensor(samples[1:], dtype=torch.float64, device=device)
    dist.all_reduce(worst, dist.ReduceOp.MAX, group=group)
    return float(worst.median())


def measure(
    device: torch.device,
    group: Group = None,
    times: int = 7,
    clock: Clock = time.perf_counter,
) -> Link:
    """Rates and fixed costs of the group's link; all ranks must ask together.

    Args:
        clock: `time.process_time` where others share the cores: a wait then costs nothing, though.
    """
    ranks = dist.get_world_size(group)
    rows = _BYTES[device.type] // _ROW // ranks * ranks
    x_RD = torch.ones(rows, _ROW // 4, device=device)
    even = [rows // ranks] * ranks
    message = _message(even, device)
    id_NK = torch.arange(rows * x_RD.size(1) // 8, device=device, dtype=torch.int32)[:, None] % 64
    crossing = x_RD.nbytes * (ranks - 1) / ranks  # what stays on its rank crosses nothing
    ways: dict[str, tuple[Callable[[], object], float]] = {
        "all_to_all": (lambda: exchange(x_RD, even, even, group), crossing),
        "all_gather": (lambda: all_gather(x_RD[: even[0]], ranks, group), crossing),
        "reduce_scatter": (lambda: reduce_scatter(x_RD, ranks, group), crossing),
        "gather": (lambda: gathered(x_RD, message), x_RD.nbytes),
        "combine": (lambda: sum_rows(x_RD, message), x_RD.nbytes),
        "plan": (lambda: plan_from_ids(id_NK, 64), id_NK.nbytes),
    }
    mover = peer_mover(device, group)
    names = [name for name in NAMES if mover is not None or name != "peer_memory"]
    if mover is not None:
        splits = Splits(even, even, torch.tensor(even, device=device), rows)
        given = (x_RD, message, 1, splits, message.overflow, False)
        ways["put"] = (lambda: mover.start_out(*given)[3].wait(), crossing)
    rates = {
        n: ways[n][1] / slowest(ways[n][0], device, group, times, clock) for n in RATES if n in ways
    }
    one = Problem(1, 1, ranks, ranks, 4, 4)
    return Link(
        ranks, device.type, rates, measure_transports(one, device, group, times, names, clock=clock)
    )


def peer_mover(device: torch.device, group: Group = None) -> PeerMover | None:
    """What writes into the memory of a group's ranks; None where one of them is out of reach."""
    name = zlib.crc32(platform.node().encode())
    if _least(name, device, group) != -_least(-name, device, group):
        _log.info("no peer_memory: the ranks are on several machines")
        return None
    mover, reason = PeerMover(dist.get_rank(group), group, _TIMEOUT_S), ""
    try:
        mover.ready(1, device)
    except (RuntimeError, ConfigError) as problem:  # GPUs without a way to each other, other CPUs
        reason = str(problem).strip().splitlines()[0]
    if _least(int(not reason), device, group):
        return mover
    _log.info("no peer_memory: %s", reason or "another rank cannot")
    return None


def _least(number: int, device: torch.device, group: Group) -> int:
    """The least that a rank of the group says."""
    least = torch.tensor(number, device=device)
    dist.all_reduce(least, dist.ReduceOp.MIN, group=group)
    return int(least)


def _message(send: list[int], device: torch.device) -> Rows:
    """Of as many tokens, each of which goes to one rank."""
    send_W = torch.tensor(send, device=device)
    ranks_R = torch.arange(len(send), device=device, dtype=torch.int32).repeat_interleave(send_W)
    where = Where(ranks_R[:, None], torch.zeros_like(ranks_R)[:, None])
    return lay_out(where, torch.ones(len(ranks_R), 1, device=device), send_W, sum(send))


def measure_transports(
    problem: Problem,
    device: torch.device,
    group: Group = None,
    times: int = 7,
    names: Iterable[str] = NAMES,
    factor: float = 2.0,
    clock: Clock = time.perf_counter,
) -> dict[str, float]:
    """Seconds of a dispatch and a combine without gradient, by transport."""
    inputs = (*problem.draw(device, dist.get_rank(group)), problem.placement)
    took = {}
    with torch.no_grad():
        for name in names:
            by = make_transport(name, problem.tokens, factor, group, _TIMEOUT_S)
            took[name] = slowest(partial(round_trip, by, *inputs), device, group, times, clock)
    return took


def choose(link: Link, problem: Problem, factor: float = 2.0) -> str:
    """The transport that is predicted to be the fastest; the log says why."""
    seconds = predict(link, problem, factor)
    found = best(seconds, problem)
    said = ", ".join(f"{name} {took * 1e6:.0f} us" for name, took in seconds.items())
    visits = float(even_load(problem, factor).rows_WW[0].sum()) / max(problem.tokens, 1)
    _log.info(
        "transport %s for %s on %d ranks, where a token has %.3g rows; predicted: %s",
        found, problem, link.ranks, visits, said,
    )  # fmt: skip
    return found


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
