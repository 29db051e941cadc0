"""What skipping saves in time, memory and energy, on random weights: nothing is trained.

    python -m benchmarks.skip_speed --save

A training step (forward, backward, AdamW) and a decoded token, each one CUDA graph, of a model
whose blocks compute half of their tokens, beside the dense model of equal shape with the same
kernels and graphs. One GPU, under two minutes; without one, tiny shapes, to see that it runs.
"""

import argparse
import fnmatch
import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from benchmarks.energy import joules
from benchmarks.results import Row, provenance, save
from benchmarks.skip_steps import VOCAB, DecodingStep, TrainingStep, centre
from benchmarks.timing import capture
from moe_router.config import ModelConfig, RoutingConfig
from moe_router.models import CausalLM

IN_A_ROW = 10  # tokens of a sample
ROUTINGS = {
    "dense": None,
    "skip/0.5": RoutingConfig(kind="skip", keep=0.5, every=1, first=0),
    "skip/0.125/every2": RoutingConfig(kind="skip", keep=0.125, every=2, first=1),
}
# of the decoding rows: what each router's median logit is; None: no router
BIASES = {"dense": None, "skip/0.5": 0.0, "skip/all kept": 60.0}


@dataclass(frozen=True, slots=True)
class Shape:
    """Attributes:
    train: sequences and their length in a training step.
    batches: sequences of a decoding step.
    context: tokens that each has before.
    """

    model: ModelConfig
    train: tuple[int, int] | None = None
    batches: tuple[int, ...] = (1,)
    context: int = 512


def _model(dim: int, hidden: int, kv_heads: int, layers: int = 4) -> ModelConfig:
    return ModelConfig(
        layers=layers, dim=dim, heads=max(dim // 128, 2), kv_heads=kv_heads, hidden=hidden
    )


SHAPES = {
    "D2048": Shape(_model(2048, 5632, 8), (16, 1024), (1, 64)),
    "D4096": Shape(_model(4096, 14336, 8), None, (1, 64)),
    "D8192": Shape(_model(8192, 28672, 8), None),
}
TINY = {"D32": Shape(_model(32, 48, 2), (2, 16), (1, 3), context=8)}


class Bench:
    """Args:
    device: of everything.
    rounds: samples of each contender.
    seconds: of measuring energy.
    """

    def __init__(self, device: str, rounds: int, seconds: float) -> None:
        self.device, self.rounds, self.seconds = device, rounds, seconds
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32

    def jobs(self, name: str, shape: Shape) -> Mapping[str, Callable[[], list[Row]]]:
        """Each makes the rows whose names begin with its own."""
        jobs = {
            f"decode/{name}/{sequences}": partial(self._decoding, name, shape, sequences)
            for sequences in shape.batches
        }
        if shape.train is not None:
            jobs[f"train/{name}"] = partial(self._training, name, shape, *shape.train)
        return jobs

    def _training(self, name: str, shape: Shape, sequences: int, length: int) -> list[Row]:
        rows: list[Row] = []
        for routing_name, routing in ROUTINGS.items():
            self._clean()
            model = self._built(replace(shape.model, routing=routing)).train()
            step = TrainingStep(model, sequences, length)
            peak = self._peak(step)
            run = self._captured(step)
            ms = self._milliseconds({"": run}, 1)[""]
            spent = joules(run, seconds=self.seconds)
            assert bool(step.loss.isfinite()), routing_name
            row = {
                "name": f"train/{name}/{sequences}x{length}/{routing_name}",
                **_timed(ms, rows[0] if rows else None),
                "executed": step.executed(),
                "peak_mib": peak,
                "joules_per_1000": spent and round(spent / sequences * 1000, 1),
            }
            rows.append(row)
            del model, step, run
        return rows

    def _decoding(self, name: str, shape: Shape, sequences: int) -> list[Row]:
        """All contenders hold their weights at once and are timed in turn."""
        self._clean()
        runs, steps = {}, {}
        for contender, bias in BIASES.items():
            routing = None if bias is None else ROUTINGS["skip/0.5"]
            model = self._built(replace(shape.model, routing=routing)).eval()
            if bias is not None:
                centre(model, bias)
            step = steps[contender] = DecodingStep(model, sequences, shape.context)
            runs[contender] = partial(step.run, self._captured(step))
            step.rewind()
        taken = self._milliseconds(runs, IN_A_ROW)
        executed = {contender: step.executed() for contender, step in steps.items()}
        rows: list[Row] = []
        for contender, ms in taken.items():
            spent = joules(runs[contender], seconds=self.seconds / 4)
            assert bool(steps[contender].logits_BV.isfinite().all()), contender
            rows.append(
                {
                    "name": f"decode/{name}/{sequences}/{contender}",
                    **_timed(ms, rows[0] if rows else None),
                    "executed": executed[contender],
                    "joules_per_1000": spent and round(spent / sequences * 1000, 2),
                }
            )
        return rows

    def _built(self, config: ModelConfig) -> CausalLM:
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with torch.device(self.device):
                return CausalLM(config, VOCAB)
        finally:
            torch.set_default_dtype(before)

    def _captured(self, step: Callable[[], None]) -> Callable[[], Any]:
        return capture(step) if self.device == "cuda" else step

    def _clean(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()

    def _peak(self, step: "TrainingStep") -> float | None:
        """MiB of a whole step, weights and optimizer with it."""
        step()  # makes the optimizer's state
        if self.device != "cuda":
            return None
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return round(torch.cuda.max_memory_allocated() / 2**20, 1)

    def _milliseconds(
        self, runs: Mapping[str, Callable[[], Any]], repeat: int
    ) -> dict[str, list[float]]:
        """Of one of `repeat` runs, for each round but the first three."""
        samples: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(self.rounds + 3):
            for name, run in runs.items():
                took = _milliseconds(run, repeat, self.device)
                if turn >= 3:
                    samples[name].append(took)
        return samples


def _milliseconds(run: Callable[[], Any], repeat: int, device: str) -> float:
    if device != "cuda":
        began = time.perf_counter()
        for _ in range(repeat):
            run()
        return (time.perf_counter() - began) * 1e3 / repeat
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    for _ in range(repeat):
        run()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / repeat


def _timed(samples: list[float], dense: Row | None) -> Row:
    """dense: the row it is compared with; None: it is the dense one."""
    ms = statistics.median(samples)
    row: Row = {"value": round(ms, 4), "unit": "ms"}
    row["p90"] = round(sorted(samples)[len(samples) * 9 // 10], 4)
    return row | {"ratio": 1.0 if dense is None else round(dense["value"] / ms, 3), "goal": 1.4}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="*", help="jobs by shell pattern: decode/*,train/D2048")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=3.0, help="of measuring energy, each")
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shapes = SHAPES if device == "cuda" else TINY
    bench = Bench(device, args.rounds, args.seconds)
    origin, failed = provenance(device), []
    jobs = {n: job for name, shape in shapes.items() for n, job in bench.jobs(name, shape).items()}
    for name, job in jobs.items():
        if not any(fnmatch.fnmatch(name, pattern) for pattern in args.only.split(",")):
            continue
        try:
            rows = [row | origin for row in job()]
        except RuntimeError as problem:  # a graph that cannot be captured ends no other row
            failed.append(f"{name}: {problem}")
            continue
        print(*rows, sep="\n", flush=True)
        if args.save:
            save("skip_speed", rows)
    if failed:
        raise SystemExit("\n".join(failed))


if __name__ == "__main__":
    main()
