"""How the tokens of a training step reach the experts of other ranks."""

import json
import logging
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from moe_router.config import Config
from moe_router.dispatch import AllToAll, Bounded, Dispatcher, Grid, Groups, Local
from moe_router.dispatch.base import Group
from moe_router.dispatch.cost_model import RATES, Link, Problem
from moe_router.dispatch.link import choose, measure
from moe_router.dispatch.transports import NAMES, make_transport
from moe_router.observability.files import write_atomic

LINK = "link.json"  # in the run's folder
_log = logging.getLogger(__name__)


def training_dispatcher(
    config: Config, ranks: int, device: torch.device, run_dir: Path | None
) -> Dispatcher:
    """What `cluster.transport` names; all ranks must ask together.

    Args:
        run_dir: remembers what was measured, so that a run that goes on takes the same transport.
    """
    if ranks == 1:
        return Local()
    size = config.cluster.expert_ranks or ranks
    if size == ranks or ranks % size:  # fewer ranks went on than the row divides: one row
        return _in_row(config, ranks, None, ranks, device, run_dir)
    groups = Groups.form(size, config.cluster.timeout_s)
    return Grid(_in_row(config, size, groups.row, ranks, device, run_dir), groups)


def _in_row(
    config: Config,
    size: int,
    group: Group,
    ranks: int,
    device: torch.device,
    run_dir: Path | None,
) -> Dispatcher:
    """Among the ranks that share one set of experts.

    Args:
        size, group: of them.
        ranks: all; the batch is cut for these.
    """
    if size == 1:
        return Local()
    rows = config.train.batch // config.train.accumulation // ranks
    tokens, factor = rows * config.data.seq_len, config.cluster.row_bound
    name: str = config.cluster.transport
    if name == "auto":
        name = _chosen(config, size, group, tokens, device, run_dir)
    exact = AllToAll(group)
    if name == "all_to_all":
        return exact
    timeout_s = config.cluster.timeout_s
    return Bounded(make_transport(name, tokens, factor, group, timeout_s), exact)


def _chosen(
    config: Config,
    ranks: int,
    group: Group,
    tokens: int,
    device: torch.device,
    run_dir: Path | None,
) -> str:
    moe = config.model.moe
    if moe is None or device.type != "cuda":
        # nothing runs ahead of the host there, so its splits cost nothing and send no empty slots
        _log.info("transport all_to_all: on a CPU its host splits wait for nothing")
        return "all_to_all"
    itemsize = 2 if config.train.precision == "bf16" else 4
    problem = Problem(tokens, moe.top_k, moe.experts, ranks, config.model.dim, itemsize)
    return choose(remembered_link(ranks, device, run_dir, group), problem, config.cluster.row_bound)


def remembered_link(
    ranks: int, device: torch.device, run_dir: Path | None, group: Group = None
) -> Link:
    """The run's link as it was measured when the run began, equal on all ranks."""
    first = dist.get_rank() == 0
    numbers = torch.zeros(len(RATES) + len(NAMES), dtype=torch.float64, device=device)
    if first and run_dir is not None and (run_dir / LINK).is_file():
        old = Link(**json.loads((run_dir / LINK).read_text()))
        whole = set(RATES) - {"put"} <= old.bytes_per_s.keys()
        if whole and (old.ranks, old.device) == (ranks, device.type):
            numbers.copy_(torch.tensor(_numbers(old), dtype=torch.float64))
    dist.broadcast(numbers, 0)
    if numbers[0] > 0:
        return _link(ranks, device, numbers)
    link = measure(device, group)
    numbers.copy_(torch.tensor(_numbers(link), dtype=torch.float64))
    dist.broadcast(numbers, 0)  # every row measured its own
    link = _link(ranks, device, numbers)
    if first and run_dir is not None:
        write_atomic(run_dir / LINK, json.dumps(asdict(link), indent=1).encode() + b"\n")
    return link


def _numbers(link: Link) -> list[float]:
    """0 for what this link cannot do."""
    rates = [link.bytes_per_s.get(name, 0.0) for name in RATES]
    return [*rates, *(link.fixed_s.get(name, 0.0) for name in NAMES)]


def _link(ranks: int, device: torch.device, numbers: Tensor) -> Link:
    rates, fixed = numbers[: len(RATES)].tolist(), numbers[len(RATES) :].tolist()
    return Link(ranks, device.type, _known(RATES, rates), _known(NAMES, fixed))


def _known(names: tuple[str, ...], numbers: list[float]) -> dict[str, float]:
    return {name: number for name, number in zip(names, numbers, strict=True) if number > 0}
