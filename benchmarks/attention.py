"""Routed attention beside the fastest dense attention of the installed torch, on one GPU.

    python -m benchmarks.attention [--only PATTERN] [--seconds N] [--save]

B 1, 32 heads, 8 KV heads, 128 channels, bf16, blocks of 64. A row's time holds selection and
attention; `share30` chooses the fewest blocks that hold 30% of the causal pairs, `top16` 16 blocks.
Ours is checked at the size that is timed; then all are timed in turn, each sample with a cold L2
cache, as CUDA graphs where that works. `tiles` are our kernels alone, as
`block_attention.TILES` cuts them, in TFLOP/s of executed pairs. `decode` is one token at the end of
a text in a paged cache, beside our dense attention to it. Rows are saved as they are made;
one that fails says why.
"""

import argparse
import fnmatch
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks.attention_cases import BOUND, DENSE, Case, Shape
from benchmarks.attention_decode import DECODED, decode_name, measure_decode
from benchmarks.attention_runs import pass_of, seconds, shown, wait
from benchmarks.attention_tiles import measure_tile, tile_names
from benchmarks.contest import WrongResult, tell, why
from benchmarks.memory import peak_mib
from benchmarks.results import Row, provenance, save
from benchmarks.timing import Deadline, Run, Timing, capture, interleave, matmul_ceiling

KINDS = ("share30", "top16")
PASSES = ("forward", "forward_backward")
# what is told apart first comes first: a run may be short
TOKENS = (4096, 32768, 65536, 8192, 16384, 2048, 1024)
# times the speed of the best dense attention
GOALS = {
    "forward/share30/T4096": 1.0, "forward_backward/share30/T4096": 1.0,
    "forward/share30/T32768": 2.5, "forward_backward/share30/T32768": 2.0,
    "forward/top16/T65536": 8.0,
}  # fmt: skip
GROWTH = (8192, 65536)
GRAPHED = 65536  # tokens at most
SAMPLES_S = 0.4  # of each contender
SLOW = 1.5  # a dense kernel that takes so many times the fastest is timed once


def row_name(way: str, kind: str, tokens: int) -> str:
    return f"{way}/{kind}/T{tokens}"


class Bench:
    """Args:
    shape: sizes of the heads; tokens and kind are set by the rows.
    chosen: says whether a row is wanted, by name.
    """

    def __init__(
        self, shape: Shape, device: torch.device, chosen: Callable[[str], bool], seconds: float
    ) -> None:
        self.shape, self.device, self.chosen = shape, device, chosen
        self.deadline = Deadline(seconds)
        self.ceiling = matmul_ceiling() if device.type == "cuda" else math.nan
        self.took: dict[str, float] = {}

    def rows(self, tokens: tuple[int, ...]) -> Iterator[Row]:
        for T in tokens:
            case = None
            for way in PASSES:
                kinds = [kind for kind in KINDS if self.chosen(row_name(way, kind, T))]
                if kinds and not self.deadline.over():
                    case = case or Case(replace(self.shape, tokens=T), self.device)
                    yield from self.contest(case, way, kinds)
            for name in tile_names(T):
                if self.chosen(name) and not self.deadline.over():
                    case = case or Case(replace(self.shape, tokens=T), self.device)
                    tile = partial(measure_tile, case, name)
                    yield self.alone(name, "TFLOP/s", tile) | {"ceiling": round(self.ceiling, 1)}
            if T in DECODED and self.chosen(decode_name(T)) and not self.deadline.over():
                sizes = (self.shape.heads, self.shape.kv_heads, self.shape.channels)
                run = partial(measure_decode, T, *sizes, self.device)
                yield self.alone(decode_name(T), "us", run)
        yield from self.growth()

    def contest(self, case: Case, way: str, kinds: list[str]) -> Iterator[Row]:
        """A row for each kind; all kinds and all dense kernels are timed in turn."""
        runs: dict[str, Run] = {}
        errors: dict[str, float] = {}
        said: dict[str, str] = {}
        for kind in kinds:
            if self.works(case, kind, said, partial(self.check, case, kind, way, errors)):
                runs[kind] = pass_of(case, way, partial(case.ours, kind))
        for name in DENSE:
            run = pass_of(case, way, partial(case.dense, name))
            if self.works(case, name, said, run):
                runs[name] = run
        peaks = {name: peak_mib(run) for name, run in runs.items()}
        choosing: dict[str, Run] = {
            f"{kind}, selection": partial(case.choose, kind) for kind in errors
        }
        times = self.time({**self.hidden(case, runs), **self.hidden(case, choosing)})
        dense: dict[str, Any] = {name: {"reason": said.get(name)} for name in DENSE}
        for name in DENSE:
            if name in times:
                dense[name] = {"value": round(times[name].median, 1), "peak_mib": peaks[name]}
        for kind in kinds:
            shape = replace(case.shape, kind=kind)
            row: Row = {"name": row_name(way, kind, shape.tokens), "unit": "us", "peers": dense}
            if kind not in times:
                yield row | {"value": None, "correct": False, "reason": said[kind]}
                continue
            chose = times[f"{kind}, selection"].median
            row |= self.filled(row["name"], shape, times[kind], dense, chose)
            yield row | {"error": float(f"{errors[kind]:.3g}"), "peak_mib": peaks[kind]}

    def hidden(self, case: Case, runs: dict[str, Run]) -> dict[str, Run]:
        """Runs as CUDA graphs: the host is slower than short ones are. What cannot be captured
        stays as it is."""
        if case.shape.tokens > GRAPHED or self.device.type != "cuda":
            return runs
        return {name: self.graphed(name, run) for name, run in runs.items()}

    def graphed(self, name: str, run: Run) -> Run:
        try:
            return capture(run)
        except Exception as problem:  # then it is timed with its launches
            torch.cuda.synchronize()
            tell(f"{name}: no graph, {why(problem)}")
            return run

    def works(self, case: Case, name: str, said: dict[str, str], run: Run) -> bool:
        """Run it once; what it raises is its line in the table."""
        tell(f"T{case.shape.tokens}: {name}")
        try:
            run()
            wait(self.device)
        except Exception as problem:  # each kernel refuses in its own way
            said[name] = why(problem)
            tell(said[name])
            return False
        return True

    def check(self, case: Case, kind: str, way: str, errors: dict[str, float]) -> None:
        errors[kind] = case.error(kind, gradients=way != "forward")
        if not errors[kind] < BOUND[case.q.dtype]:
            raise WrongResult(f"error {errors[kind]:.3g}")

    def time(self, runs: dict[str, Run]) -> dict[str, Timing]:
        once = {name: seconds(run, self.device) for name, run in runs.items()}
        fastest = min((took for name, took in once.items() if name in DENSE), default=0.0)
        slow = {n for n, took in once.items() if n in DENSE and took > SLOW * fastest}
        quick = {name: run for name, run in runs.items() if name not in slow}
        longest = max((once[name] for name in quick), default=1.0)
        rounds = max(3, min(20, int(SAMPLES_S / longest)))
        times = interleave(quick, rounds=rounds) if quick else {}
        return times | {name: Timing(once[name] * 1e6, once[name] * 1e6) for name in slow}

    def filled(
        self, name: str, shape: Shape, took: Timing, dense: dict[str, Any], chose: float
    ) -> Row:
        value, back = took.median, name.startswith("forward_backward")
        rivals = {peer: entry["value"] for peer, entry in dense.items() if "value" in entry}
        best = min(rivals, key=rivals.__getitem__, default=None)
        # two products forward, five more in the least backward pass
        work = shape.flops(shape.pairs) * (3.5 if back else 1)
        self.took[name] = value
        return {
            "value": round(value, 1), "p90": round(took.p90, 1),
            "best_peer": best, "peer_value": rivals.get(best or ""),
            "ratio": round(rivals[best] / value, 3) if best else None, "goal": GOALS.get(name),
            "ceiling": None if math.isnan(self.ceiling) else round(work / self.ceiling / 1e6, 1),
            "tflops": round(work / value / 1e6, 1), "selection_us": round(chose, 1),
            "share": round(shape.pairs / shape.dense_pairs, 4), "top_k": shape.top_k,
            "correct": True,
        }  # fmt: skip

    def growth(self) -> Iterator[Row]:
        """How time grows with n at a fixed number of blocks: the exponent between two lengths."""
        for way in PASSES:
            name = f"growth/top16/{way}"
            names = [row_name(way, "top16", T) for T in GROWTH]
            if self.chosen(name) and all(end in self.took for end in names):
                ends = [self.took[end] for end in names]
                exponent = math.log(ends[1] / ends[0]) / math.log(GROWTH[1] / GROWTH[0])
                yield {
                    "name": name, "value": round(exponent, 3), "unit": "exponent of n",
                    "between": GROWTH, "goal": 1.15, "correct": True,
                }  # fmt: skip

    def alone(self, name: str, unit: str, measure: Callable[[], Row]) -> Row:
        """A row that needs no contest."""
        tell(name)
        row: Row = {"name": name, "unit": unit}
        try:
            return row | measure() | {"correct": True}
        except Exception as problem:  # a tile that does not fit is a line of the table
            return row | {"value": None, "correct": False, "reason": why(problem)}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="*", help="rows by shell pattern, several by commas")
    parser.add_argument("--tokens", help="lengths by commas, in the place of 1k to 64k")
    parser.add_argument("--heads", default="32,8,128", help="heads, KV heads, channels")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no row after these")
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args(arguments)
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    origin, patterns = provenance(kind), args.only.split(",")
    heads, kv_heads, channels = map(int, args.heads.split(","))
    shape = Shape("share30", 0, heads, kv_heads, channels)
    tokens = tuple(map(int, args.tokens.split(","))) if args.tokens else TOKENS

    def chosen(name: str) -> bool:
        return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)

    for row in Bench(shape, torch.device(kind), chosen, args.seconds).rows(tokens):
        print(shown(row), flush=True)
        if args.save:
            save("attention", [row | origin])


if __name__ == "__main__":
    main()
