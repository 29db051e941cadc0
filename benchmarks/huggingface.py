"""Experts of transformers' models by our backend beside every implementation transformers has.

    python -m benchmarks.huggingface [--only PATTERN] [--seconds S] [--save]

A module of experts at the widths of a published model, random bf16 weights, ids given: prefill and
decode without gradients, forward with them, a training step. Then whole models of four layers of
these widths. Contenders are what the installed transformers registers, checked first (modules
against fp64, models against `eager`), then timed in turn in one process with a cold L2 cache.
Decode waits for the host before each sample, as `generate` does; elsewhere launches are hidden.
`decode_graph` replays a CUDA graph of a decode. What cannot run (not installed, out of memory, not
to be captured) stands in the row with its reason. Each row is saved as it is made, and none is
begun after `--seconds`. Without a GPU the same runs in fp32 at `--shapes tiny`, without graphs.
"""

import argparse
import fnmatch
import importlib.metadata
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.contest import OURS, Field, Result, WrongResult, contend, row, tell, timed
from benchmarks.huggingface_models import check, small_model
from benchmarks.layer_check import BOUND, Oracle, make_layer
from benchmarks.peers.base import Layer, Peer
from benchmarks.results import Row, provenance, save
from benchmarks.timing import Deadline, Run, capture, copy_ceiling, matmul_ceiling
from moe_router import register_transformers

Sizes = tuple[int, int, int, int]
SHAPES: dict[str, dict[str, Sizes]] = {  # D, F, E, K
    "published": {
        "mixtral": (4096, 14336, 8, 2),
        "qwen3_moe": (2048, 768, 128, 8),
        "olmoe": (2048, 1024, 64, 8),
    },
    "tiny": {"mixtral": (32, 48, 4, 2)},
}
DECODES = (1, 16, 64)
LONG = {"published": (4096, 16384), "tiny": (64, 96)}  # tokens of prefill; of forward and training


def cases(which: str) -> Iterator[tuple[str, str, int, Sizes]]:
    """kind, model, tokens and sizes of every row; what says most comes first."""
    prefill, train = LONG[which]
    modules = [("prefill", prefill), *(("decode", tokens) for tokens in DECODES)]
    modules += [("forward", train), ("train", train)]
    wholes = [("model_prefill", prefill), *(("model_decode", tokens) for tokens in DECODES)]
    # the last: after a capture that failed, torch's default generator refuses to draw
    graphs = [("decode_graph", tokens) for tokens in DECODES]
    for kinds in (modules, wholes, graphs):
        for model, sizes in SHAPES[which].items():
            for kind, tokens in kinds:
                if kind != "decode_graph" or torch.cuda.is_available():
                    yield kind, model, tokens, sizes


def name_of(kind: str, model: str, tokens: int) -> str:
    return f"{kind}/{model}/T{tokens}"


def line_up() -> dict[str, Peer | str]:
    """Ours first, then eager and whatever else is registered."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    from benchmarks.peers.transformers import layer_by

    register_transformers()
    others = sorted(set(ALL_EXPERTS_FUNCTIONS) - {OURS})
    return {
        name: Peer(
            name,
            "moe-router" if name == OURS else "transformers",
            layer_by(name),
            graph="its loop over experts waits for the device" if name == "eager" else True,
        )
        for name in (OURS, "eager", *others)
    }


def measure_module(
    of: Field, kind: str, tokens: int, sizes: Sizes, rounds: int
) -> dict[str, Result]:
    """One row's contenders on a module of experts."""
    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    layer = make_layer((tokens, *sizes), device=device, dtype=dtype)
    oracle, train = Oracle(layer), kind in ("forward", "train")

    def prepare(peer: Peer, result: Result) -> Run:
        assert not isinstance(peer.layer, str)
        if kind == "decode_graph" and isinstance(peer.graph, str):
            raise NotImplementedError(peer.graph)
        call = peer.layer(layer, train)
        result.error = oracle.backward(call) if kind == "train" else oracle.forward(call)
        if not result.error < BOUND:
            raise WrongResult(f"error {result.error:.3g}")
        run = _passes(kind, layer, call.run, call.leaves)
        if kind == "decode_graph":
            result.mode = "graph"
            return capture(run)
        result.mode = "eager" if kind == "decode" else "eager, launches hidden"
        return run

    tag = f"{kind} T{tokens} {sizes}"
    return timed(*contend(of, tag, prepare), rounds=rounds, idle=kind == "decode")


def _passes(kind: str, layer: Layer, run: Callable[[], Tensor], leaves: list[Tensor]) -> Run:
    if kind == "train":
        return lambda: torch.autograd.grad(run(), leaves, layer.grad_TD)
    return run if kind == "forward" else torch.no_grad()(run)


def measure_model(
    of: Field, kind: str, model: str, tokens: int, sizes: Sizes, rounds: int
) -> dict[str, Result]:
    """One row's contenders in a whole model of four layers, whose weights they share."""
    whole = small_model(model, sizes, decodes=kind == "model_decode", tokens=tokens)
    whole.switch("eager")
    wanted = whole.run()

    def prepare(peer: Peer, result: Result) -> Run:
        def run() -> Tensor:
            whole.switch(peer.name)
            return whole.run()

        result.error = check(run(), wanted)
        if not result.error < BOUND:
            raise WrongResult(f"error {result.error:.3g} beside eager")
        result.mode = "eager"
        return run

    tag = f"{kind} {model} T{tokens}"
    return timed(*contend(of, tag, prepare), rounds=rounds, idle=True)


def least(of: Field, tokens: int, sizes: Sizes, kind: str) -> float:
    """Microseconds of a module's products at the measured rate, or of reading the weights that are
    hit; 0: no ceiling was measured."""
    D, F, E, K = sizes
    if not of.matmul or kind.startswith("model_"):
        return 0.0
    flop = (18 if kind == "train" else 6) * tokens * K * D * F
    hit = 3 * D * F * 2 * E * (1 - (1 - K / E) ** tokens)
    return max(flop / of.matmul / 1e6, hit / of.copy / 1e3)


def micro(result: Result, slow: bool) -> float | None:
    if result.timing is None:
        return None
    return round(result.timing.p90 if slow else result.timing.median, 2)


def rows(which: str, patterns: list[str], rounds: int, seconds: float = 1e9) -> Iterator[Row]:
    """Measure what is asked for, row by row, and begin none after `seconds`."""
    deadline = Deadline(seconds)
    cuda = torch.cuda.is_available()
    ceilings = (matmul_ceiling(), copy_ceiling()) if cuda else (0.0, 0.0)
    of = Field(line_up(), *ceilings)
    origin = provenance("cuda" if cuda else "cpu")
    if cuda:
        origin |= {"triton": importlib.metadata.version("triton")}
    for kind, model, tokens, sizes in cases(which):
        name = name_of(kind, model, tokens)
        if not any(fnmatch.fnmatch(name, pattern) for pattern in patterns):
            continue
        if deadline.over():
            tell(f"{name}: not begun, the {seconds:g} seconds are over")
            continue
        if kind.startswith("model_"):
            results = measure_model(of, kind, model, tokens, sizes, rounds)
        else:
            results = measure_module(of, kind, tokens, sizes, rounds)
        ceiling = least(of, tokens, sizes, kind)
        made = row(name, "us", results, micro, ceiling=ceiling, goal=None, peers=of.peers)
        yield made | origin
        if cuda:
            torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="*", help="rows by shell pattern, several by commas")
    parser.add_argument("--shapes", choices=sorted(SHAPES), default="published")
    parser.add_argument("--rounds", type=int, default=20, help="samples of each contender")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no row after these")
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    for one in rows(args.shapes, args.only.split(","), args.rounds, args.seconds):
        others = ", ".join(
            f"{name} {entry.get('value', entry.get('reason'))}"
            for name, entry in one["peers"].items()
        )
        said = f"{one['name']}: {one['value']} us (x{one['ratio']}) | {others}"
        print(said if one["correct"] else f"{said} | {one['reason']}", flush=True)
        if args.save:
            save("huggingface", [one])


if __name__ == "__main__":
    main()
