"""Rows of the kernels' table: ours and the peers, checked, then timed in turn in one process."""

import random
from typing import Any

import torch
from torch import Tensor

from benchmarks.contest import OURS, Field, Result, WrongResult, contend, graphed, timed
from benchmarks.layer_check import BOUND, Oracle, make_layer, peak_bytes, saved_bytes
from benchmarks.peers import ours
from benchmarks.peers.base import Call, Layer, Limited, Peer
from benchmarks.timing import Run

HIDDEN = "eager, launches hidden"


def measure_route(of: Field, shape: tuple[int, int, int], width: int | None) -> Any:
    """Graph replays and eager calls of logits to Plan; with the rows of x if width is given."""
    E, K, T = shape
    torch.manual_seed(T)
    logits = torch.randn(T, E, device="cuda")
    x_TD = None if width is None else torch.randn(T, width, device="cuda").bfloat16()
    wanted = logits.topk(K, 1).indices.sort(1).values
    eager: dict[str, Run] = {}

    def prepare(peer: Peer, result: Result) -> Run:
        make = peer.route if x_TD is None else peer.permute
        if isinstance(make, str):
            raise NotImplementedError(make)
        run = make(logits, K) if x_TD is None else make(logits, K, x_TD)  # type: ignore[call-arg]
        ids: Tensor = run()
        if not torch.equal(ids.long().sort(1).values, wanted):
            raise WrongResult("other experts than the reference")
        if peer.name == OURS and not ours.check_route(logits, K, x_TD):
            raise WrongResult("not the reference's Plan")
        eager[peer.name] = run
        return graphed(peer, run, result)

    tag = f"route T{T} D{width}"
    runs, results = contend(of, tag, prepare)
    timed(runs, results, rounds=100)
    by_name = {of.peers[name].name: name for name in runs}  # type: ignore[union-attr]
    calls = {by_name[name]: run for name, run in eager.items()}
    host = {name: Result(reason=result.reason) for name, result in results.items()}
    for name in calls:
        host[name].mode = "eager"
    return results, timed(calls, host, rounds=50, idle=True)


def _checked(peer: Peer, layer: Layer, oracle: Oracle, result: Result) -> Call:
    """A peer's forward pass, found right."""
    if isinstance(peer.layer, str):
        raise NotImplementedError(peer.layer)
    call = peer.layer(layer, False)
    result.error = oracle.forward(call)
    if not result.error < BOUND:
        raise WrongResult(f"error {result.error:.3g}")
    return call


def _forward(of: Field, tag: str, layer: Layer, oracle: Oracle) -> dict[str, Result]:
    def prepare(peer: Peer, result: Result) -> Run:
        call = _checked(peer, layer, oracle, result)

        def run() -> None:
            with torch.no_grad():
                call.run()

        result.mode = HIDDEN + (", sorts inside" if call.sorts else "")
        return run

    return timed(*contend(of, f"forward {tag}", prepare), rounds=20)


def _both(of: Field, tag: str, layer: Layer, oracle: Oracle) -> dict[str, Result]:
    def prepare(peer: Peer, result: Result) -> Run:
        if isinstance(peer.backward, str) or isinstance(peer.layer, str):
            raise NotImplementedError(str(peer.backward))
        call: Call = peer.layer(layer, True)
        result.error = oracle.backward(call)
        if not result.error < BOUND:
            raise WrongResult(f"error {result.error:.3g}")

        def run() -> None:
            torch.autograd.grad(call.run(), call.leaves, layer.grad_TD)

        result.saved, result.peak, result.mode = saved_bytes(call), peak_bytes(run), HIDDEN
        return run

    return timed(*contend(of, f"forward_backward {tag}", prepare), rounds=12)


def measure_layer(of: Field, shape: tuple[int, ...], kinds: set[str]) -> dict[str, Any]:
    """Results by kind: forward, forward_backward (which has the saved bytes as well)."""
    layer = make_layer(shape)
    oracle = Oracle(layer)
    tag = "/".join(map(str, shape))
    out: dict[str, Any] = {}
    if "forward" in kinds:
        out["forward"] = _forward(of, tag, layer, oracle)
    torch.cuda.empty_cache()
    if kinds - {"forward"}:
        out["forward_backward"] = _both(of, tag, layer, oracle)
    torch.cuda.empty_cache()
    return out


def measure_groups(of: Field, shape: tuple[int, int, int]) -> dict[str, Result]:
    """Graph replays of a choice limited to 4 of 8 groups: sigmoid, bias, logits to Plan."""
    E, K, T = shape
    torch.manual_seed(T)
    bias_E = torch.randn(E, device="cuda") * 0.1
    limited = Limited(torch.randn(T, E, device="cuda"), bias_E, K, groups=8, top_groups=4)
    wanted = ours.route_groups(limited, "reference")().long().sort(1).values

    def prepare(peer: Peer, result: Result) -> Run:
        if isinstance(peer.route_groups, str):
            raise NotImplementedError(peer.route_groups)
        run = peer.route_groups(limited)
        if not torch.equal(run().long().sort(1).values, wanted):
            raise WrongResult("other experts than the reference")
        return graphed(peer, run, result)

    return timed(*contend(of, f"route_groups T{T}", prepare), rounds=100)


def measure_decode(of: Field, shape: tuple[int, ...]) -> dict[str, Result]:
    """Graph replays of a layer with few tokens, ids given."""
    layer = make_layer(shape)
    oracle = Oracle(layer)

    def prepare(peer: Peer, result: Result) -> Run:
        call = _checked(peer, layer, oracle, result)
        return graphed(peer, torch.no_grad()(call.run), result)

    return timed(*contend(of, f"decode {shape}", prepare), rounds=100)


def measure_decode_layer(of: Field, shape: tuple[int, ...]) -> dict[str, Result]:
    """Graph replays of the whole of our layer, from x alone: router, Plan, experts."""
    run = torch.no_grad()(ours.whole_layer(make_layer(shape)))
    alone = Field({OURS: of.peers[OURS]})

    def prepare(peer: Peer, result: Result) -> Run:
        return graphed(peer, run, result)

    return timed(*contend(alone, f"decode_layer {shape}", prepare), rounds=100)


def drawn_near(shape: tuple[int, ...], seed: int) -> tuple[int, ...]:
    """A shape that nobody tuned for: each size within a quarter of the given one's."""
    T, D, hidden, E, K = shape
    draw = random.Random(seed)

    def near(size: int, step: int) -> int:
        span = max(1, size // (4 * step))
        moved = draw.choice([n for n in range(-span, span + 1) if n])
        return size + moved * step

    return near(T, 8), near(D, 64), near(hidden, 32), near(E, 4), K


def measure_drawn(of: Field, shape: tuple[int, ...], seed: int) -> tuple[Any, dict[str, Result]]:
    """A shape drawn at run time, and forward passes of it and of its tuned neighbour, ours alone,
    as contenders `drawn` and `neighbour`."""
    drawn = drawn_near(shape, seed)
    peers: dict[str, Peer | str] = {"drawn": of.peers[OURS], "neighbour": of.peers[OURS]}
    layers = [make_layer(one) for one in (drawn, shape)]
    left = iter(layers)

    def prepare(peer: Peer, result: Result) -> Run:
        layer = next(left)
        call = _checked(peer, layer, Oracle(layer), result)
        result.mode = HIDDEN
        return torch.no_grad()(call.run)

    runs, results = contend(Field(peers), f"drawn {drawn}", prepare)
    return drawn, timed(runs, results, rounds=20, needs="drawn")
