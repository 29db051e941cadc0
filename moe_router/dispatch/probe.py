"""`moe-router doctor --links`: real ranks here, every transport predicted and measured."""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from moe_router.dispatch.cost_model import Link, Problem, predict
from moe_router.dispatch.link import choose, measure, measure_transports
from moe_router.dispatch.ranks import local_device, run_here

_RANKS = 2
_ON_GPUS = ((4096, 8, 256, 7168, 2), (8192, 6, 64, 2048, 2), (128, 8, 256, 7168, 2))
_ON_CPUS = ((1024, 2, 8, 256, 4), (4096, 8, 64, 128, 4), (64, 2, 8, 128, 4))


@dataclass(frozen=True, slots=True)
class Probe:
    """One problem on one link.

    Attributes:
        predicted, measured: seconds of a dispatch and a combine, by transport.
        chosen: what the chooser takes.
    """

    problem: Problem
    predicted: dict[str, float]
    measured: dict[str, float]
    chosen: str


def probe() -> tuple[Link, list[Probe]]:
    """Measure in new processes: one for each of two GPUs over NCCL, else two over gloo."""
    said = run_here(_RANKS, local_device(_RANKS), _measured)
    probes = [Probe(Problem(**one.pop("problem")), **one) for one in said["probes"]]
    return Link(**said["link"]), probes


def _measured(device: torch.device) -> dict[str, Any]:
    link = measure(device)
    probes = []
    for tokens, top_k, experts, dim, itemsize in _ON_GPUS if device.type == "cuda" else _ON_CPUS:
        problem = Problem(tokens, top_k, experts, _RANKS, dim, itemsize)
        took = measure_transports(problem, device, names=link.fixed_s)
        found = Probe(problem, predict(link, problem), took, choose(link, problem))
        probes.append(asdict(found))
    return {"link": asdict(link), "probes": probes}
