"""Contenders in one row of a table: checked, timed in turn in one process, written down."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.peers.base import Peer
from benchmarks.results import Row
from benchmarks.timing import Run, Timing, capture, interleave

OURS = "moe_router"
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
    peak: int | None = None


def tell(text: str) -> None:
    print(f"[{time.monotonic() - STARTED:5.0f} s] {text}", file=sys.stderr, flush=True)


def why(problem: BaseException) -> str:
    lines = str(problem).strip().splitlines() or [""]
    return f"{type(problem).__name__}: {lines[0][:120]}"


def contend(of: Field, tag: str, prepare: Callable[[Peer, Result], Run]) -> tuple[Any, Any]:
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


def graphed(peer: Peer, run: Run, result: Result) -> Run:
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


def timed(
    runs: dict[str, Run], results: dict[str, Result], *, needs: str = OURS, **how: Any
) -> dict[str, Result]:
    """Time whom `contend` let through, if the contender that the row is about is among them."""
    if needs in runs:
        for name, timing in interleave(runs, **how).items():
            results[name].timing = timing
    return results


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
