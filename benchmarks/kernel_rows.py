"""Rows of the kernels' table: ours and the peers, checked, then timed in turn in one process."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.layer_check import BOUND, Oracle, make_layer, saved_bytes
from benchmarks.peers import ours
from benchmarks.peers.base import Call, Layer, Peer
from benchmarks.results import Row
from benchmarks.timing import Run, Timing, capture, interleave

OURS = "moe_router"
HIDDEN = "eager, launches hidden"
STARTED = time.monotonic()


class WrongResult(Exception):
    """A contender's numbers are not the reference's."""


@dataclass
class Field:
    """Everybody who takes part; a string says why a peer does not."""

    peers: dict[str, Peer | str]
    matmul: float = 0.0  # measured ceilings: TFLOP/s, GB/s
    copy: float = 0.0
    untuned: dict[str, set[str]] = field(default_factory=dict)  # peer: shapes left out


@dataclass
class Result:
    """One contender in one row: a value with its spread, or a reason."""

    timing: Timing | None = None
    mode: str = ""
    error: float | None = None
    reason: str = ""
    saved: int | None = None


def tell(text: str) -> None:
    print(f"[{time.monotonic() - STARTED:5.0f} s] {text}", file=sys.stderr, flush=True)


def why(problem: BaseException) -> str:
    lines = str(problem).strip().splitlines() or [""]
    return f"{type(problem).__name__}: {lines[0][:120]}"


def _all(of: Field, tag: str, prepare: Callable[[Peer, Result], Run]) -> tuple[Any, Any]:
    """Prepare and check every contender; failures become reasons in their results."""
    runs: dict[str, Run] = {}
    results: dict[str, Result] = {}
    for name, peer in of.peers.items():
        result = results[name] = Result()
        if isinstance(peer, str):
            result.reason = peer
            continue
        if any(shape in tag for shape in of.untuned.get(name, ())):
            result.reason = "not all of its tuning candidates were compiled in the time given"
            continue
        tell(f"{tag}: {peer.name}")
        try:
            runs[name] = prepare(peer, result)
        except Exception as problem:  # whatever a peer raises is its line in the table
            result.reason = why(problem)
            tell(f"{tag}: {peer.name}: {result.reason}")
    return runs, results


def _graphed(peer: Peer, run: Run, result: Result) -> Run:
    """A CUDA graph of run where the peer allows one."""
    if isinstance(peer.graph, str):
        result.mode = f"eager: {peer.graph}"
        return run
    try:
        replay = capture(run)
    except Exception as problem:  # then it is timed eagerly, and the row says so
        torch.cuda.synchronize()
        result.mode = f"eager: no graph, {why(problem)}"
        return run
    result.mode = "graph"
    return replay


def _finish(runs: dict[str, Run], results: dict[str, Result], **how: Any) -> dict[str, Result]:
    if OURS in runs:
        for name, timing in interleave(runs, **how).items():
            results[name].timing = timing
    return results


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
        return _graphed(peer, run, result)

    tag = f"route T{T} D{width}"
    runs, results = _all(of, tag, prepare)
    _finish(runs, results, rounds=100)
    by_name = {of.peers[name].name: name for name in runs}  # type: ignore[union-attr]
    calls = {by_name[name]: run for name, run in eager.items()}
    host = {name: Result(reason=result.reason) for name, result in results.items()}
    for name in calls:
        host[name].mode = "eager"
    return results, _finish(calls, host, rounds=50, idle=True)


def _forward(of: Field, tag: str, layer: Layer, oracle: Oracle) -> dict[str, Result]:
    def prepare(peer: Peer, result: Result) -> Run:
        if isinstance(peer.layer, str):
            raise NotImplementedError(peer.layer)
        call: Call = peer.layer(layer, False)
        result.error = oracle.forward(call)
        if not result.error < BOUND:
            raise WrongResult(f"error {result.error:.3g}")

        def run() -> None:
            with torch.no_grad():
                call.run()

        result.mode = HIDDEN + (", sorts inside" if call.sorts else "")
        return run

    return _finish(*_all(of, f"forward {tag}", prepare), rounds=20)


def _both(of: Field, tag: str, layer: Layer, oracle: Oracle) -> dict[str, Result]:
    def prepare(peer: Peer, result: Result) -> Run:
        if isinstance(peer.backward, str) or isinstance(peer.layer, str):
            raise NotImplementedError(str(peer.backward))
        call: Call = peer.layer(layer, True)
        result.error = oracle.backward(call)
        if not result.error < BOUND:
            raise WrongResult(f"error {result.error:.3g}")
        result.saved, result.mode = saved_bytes(call), HIDDEN

        def run() -> None:
            torch.autograd.grad(call.run(), call.leaves, layer.grad_TD)

        return run

    return _finish(*_all(of, f"forward_backward {tag}", prepare), rounds=12)


def measure_layer(of: Field, shape: tuple[int, ...], kinds: set[str]) -> dict[str, Any]:
    """Results by kind: forward, forward_backward (which has the saved bytes as well)."""
    layer = make_layer(shape)
    oracle = Oracle(layer)
    tag = "/".join(map(str, shape))
    out: dict[str, Any] = {}
    if "forward" in kinds:
        out["forward"] = _forward(of, tag, layer, oracle)
    torch.cuda.empty_cache()
    if kinds & {"forward_backward", "saved"}:
        out["forward_backward"] = _both(of, tag, layer, oracle)
    torch.cuda.empty_cache()
    return out


def row(
    name: str,
    unit: str,
    results: dict[str, Result],
    value_of: Callable[[Result, bool], float | None],
    *,
    ceiling: float,
    goal: float | None,
    peers: dict[str, Peer | str],
) -> Row:
    """The contract's row. value_of(result, p90) is a peer's value or its slow tail."""
    up = unit == "TFLOP/s"
    table: dict[str, Any] = {}
    for key, result in results.items():
        peer = peers[key]
        value = value_of(result, False)
        label = key if isinstance(peer, str) else peer.name
        entry: dict[str, Any] = {"reason": result.reason or "not timed"}
        if value is not None:
            entry = {"value": value, "p90": value_of(result, True), "mode": result.mode}
            if result.error is not None:
                entry["error"] = float(f"{result.error:.3g}")
        if not isinstance(peer, str):
            entry["version"] = peer.version()
        table[label] = entry
    mine = table.pop(OURS)
    timed = {key: entry["value"] for key, entry in table.items() if "value" in entry}
    best = (max if up else min)(timed, key=lambda key: timed[key]) if timed else None
    value, rival = mine.get("value"), timed.get(best) if best else None
    ratio = None
    if value and rival:
        ratio = round(value / rival if up else rival / value, 3)
    return {
        "name": name, "value": value, "unit": unit, "p90": mine.get("p90"),
        "mode": mine.get("mode"), "best_peer": best, "peer_value": rival, "ratio": ratio,
        "ceiling": float(f"{ceiling:.3g}"), "goal": goal, "correct": value is not None,
        "error": mine.get("error"), "reason": mine.get("reason"), "peers": table,
    }  # fmt: skip
