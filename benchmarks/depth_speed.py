"""How fast a routed model and the full dense one are beside each other; memory and energy of both.

On a GPU a forward pass is a CUDA graph: of fixed sizes where nothing in it is a value that the host
has to read (dense, prune by rank, merge), with bounds where tokens halt, leap or skip
(`models/bounded.py`), whose copies in and out are timed with it.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.energy import joules
from benchmarks.memory import kept_bytes, peak_mib
from benchmarks.timing import capture
from moe_router.config import Config
from moe_router.models import CausalLM, Classifier, token_loss
from moe_router.models.bounded import BoundedPass
from moe_router.training.data import Batch

Model = CausalLM | Classifier
Pass = Callable[[], None]
ENERGY_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Contender:
    """Attributes:
    model: trained.
    config: of its run, whose precision it has been measured at.
    """

    model: Model
    config: Config

    @property
    def capturable(self) -> bool:
        """Whether the host knows how many tokens every block computes."""
        routing = self.config.model.routing
        if routing is None or routing.kind == "merge":
            return True
        return routing.kind == "prune" and routing.decide == "top"


def passes(contenders: dict[str, Contender], batch: Batch) -> tuple[dict[str, Pass], list[str]]:
    """A forward pass of each, ready to be timed, and who is a CUDA graph."""
    found, graphs = {}, []
    for name, contender in contenders.items():
        contender.model.eval()
        run = _forward(contender, batch)
        run()  # what is made on first use
        if batch.ids_T.is_cuda:
            try:
                run = _graph(contender, batch)
                graphs.append(name)
            except RuntimeError as error:
                print(f"{name}: no CUDA graph: {str(error).strip().splitlines()[0]}", flush=True)
        found[name] = run
    return found, graphs


def _graph(contender: Contender, batch: Batch) -> Pass:
    """Raises:
    RuntimeError: it cannot be captured.
    """
    if contender.capturable:
        return capture(_forward(contender, batch, packed=True))
    bounded = BoundedPass(contender.model)
    run = _evaluated(contender, lambda: bounded(batch.ids_T, batch.position_T, batch.offsets_B1))
    for _ in range(3):  # counts, captures, replays
        run()
    return run


def _forward(contender: Contender, batch: Batch, *, packed: bool = False) -> Pass:
    """One pass of the model.

    Args:
        packed: how sequences lie was told before: a graph cannot hold what copies it.
    """
    model = contender.model
    lie = model.packing(batch.offsets_B1, batch.ids_T.device) if packed else batch.offsets_B1
    return _evaluated(contender, lambda: model(batch.ids_T, batch.position_T, lie))


def _evaluated(contender: Contender, call: Callable[[], object]) -> Pass:
    """A call at the precision that the contender was trained in, without gradients."""
    device = next(contender.model.parameters()).device.type
    bf16 = contender.config.train.precision == "bf16"

    @torch.no_grad()
    def run() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            call()

    return run


def milliseconds(runs: dict[str, Pass], *, seconds: float) -> dict[str, tuple[float, float]]:
    """Median and p90 of one forward pass; contenders in turn, so that they share what else the
    machine does. On a GPU from the call until the device is done; on a CPU, where one thread
    computes, of that thread's own time: what else runs on the cores then counts for little.

    Args:
        seconds: to spend in all; each is run at least five times.
    """
    on_gpu = torch.cuda.is_available()
    clock = time.perf_counter if on_gpu else time.thread_time
    samples: dict[str, list[float]] = {name: [] for name in runs}
    until = time.monotonic() + seconds
    while time.monotonic() < until or len(next(iter(samples.values()))) < 5:
        for name, run in runs.items():
            began = clock()
            run()
            if on_gpu:
                torch.cuda.synchronize()
            samples[name].append((clock() - began) * 1e3)
    return {
        name: (statistics.median(of), sorted(of)[len(of) * 9 // 10]) for name, of in samples.items()
    }


def joules_per_1000(run: Pass, sequences: int) -> float | None:
    """By the GPU's own counter; None without one."""
    spent = joules(run, seconds=ENERGY_SECONDS)
    return None if spent is None else round(spent / sequences * 1000, 2)


def inference_mib(contender: Contender, batch: Batch) -> float | None:
    """Most that a forward pass holds beside weights and input, launched one operation after
    another; None on a CPU, where nobody counts it."""
    contender.model.eval()
    return peak_mib(_forward(contender, batch)) if batch.ids_T.is_cuda else None


def training_mib(contender: Contender, batch: Batch) -> float:
    """What one step keeps for its backward pass, beside weights: the same on every device."""
    model = contender.model
    model.train()
    bf16 = contender.config.train.precision == "bf16"

    def run() -> Tensor:
        with torch.autocast(batch.ids_T.device.type, torch.bfloat16, enabled=bf16):
            output = model(batch.ids_T, batch.position_T, batch.offsets_B1)
        return token_loss(output.logits, batch.target_N)

    return round(kept_bytes(run, model.parameters()) / 2**20, 1)
