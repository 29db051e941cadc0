"""How the tokens of a training step reach the experts of other ranks."""

import json
import logging
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from moe_router.config import Config
from moe_router.dispatch import AllToAll, Bounded, Dispatcher, Local
from moe_router.dispatch.link import RATES, Link, Problem, choose, measure
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
    rows = config.train.batch // config.train.accumulation // ranks
    tokens, factor = rows * config.data.seq_len, config.cluster.row_bound
    name: str = config.cluster.transport
    if name == "auto":
        name = _chosen(config, ranks, tokens, device, run_dir)
    exact = AllToAll()
    if name == "all_to_all":
        return exact
    timeout_s = config.cluster.timeout_s
    return Bounded(make_transport(name, tokens, factor, timeout_s=timeout_s), exact)


def _chosen(
    config: Config, ranks: int, tokens: int, device: torch.device, run_dir: Path | None
) -> str:
    moe = config.model.moe
    if moe is None or device.type != "cuda":
        # nothing runs ahead of the host there, so its splits cost nothing and send no empty slots
        _log.info("transport all_to_all: on a CPU its host splits wait for nothing")
        return "all_to_all"
    itemsize = 2 if config.train.precision == "bf16" else 4
    problem = Problem(tokens, moe.top_k, moe.experts, ranks, config.model.dim, itemsize)
    return choose(remembered_link(ranks, device, run_dir), problem, config.cluster.row_bound)


def remembered_link(ranks: int, device: torch.device, run_dir: Path | None) -> Link:
    """The run's link as it was measured when the run began, equal on all ranks."""
    first = dist.get_rank() == 0
    numbers = torch.zeros(len(RATES) + len(NAMES), dtype=torch.float64, device=device)
    if first and run_dir is not None and (run_dir / LINK).is_file():
        old = Link(**json.loads((run_dir / LINK).read_text()))
        if (old.ranks, old.device) == (ranks, device.type):
            found = [*(old.bytes_per_s[n] for n in RATES), *(old.fixed_s[n] for n in NAMES)]
            numbers.copy_(torch.tensor(found, dtype=torch.float64))
    dist.broadcast(numbers, 0)
    if numbers[0] > 0:
        rates, fixed = numbers[: len(RATES)].tolist(), numbers[len(RATES) :].tolist()
        pairs = (dict(zip(RATES, rates, strict=True)), dict(zip(NAMES, fixed, strict=True)))
        return Link(ranks, device.type, *pairs)
    link = measure(device)
    if first and run_dir is not None:
        write_atomic(run_dir / LINK, json.dumps(asdict(link), indent=1).encode() + b"\n")
    return link
