"""The rows of the dispatch benchmark, made of what the ranks measured."""

from collections.abc import Sequence
from typing import Any

from benchmarks.results import Row
from moe_router.dispatch.ranks import local_device
from moe_router.dispatch.transports import NAMES
from moe_router.dispatch.where import slots_of_rank
from moe_router.placement import Placement

LINK_GB_S = 450  # NVLink of an H100 or H200, one direction, by datasheet
Shape = tuple[int, int, int, int]
# T, D, K, E: what must be beaten and the goals, us, of dispatch and combine on two H200
SHAPES: dict[Shape, tuple[tuple[int, int], tuple[int, int]]] = {
    (4096, 7168, 8, 256): ((268, 185), (485, 260)),
    (8192, 2048, 6, 64): ((168, 110), (236, 150)),
    (128, 7168, 8, 256): ((45, 25), (42, 25)),
}
LAYER = (8192, 4096, 1536, 64, 8)  # T, D, F, E, K
LAYER_ROW = "layer/weak_scaling"


def case_name(way: str, shape: Shape, routing: str) -> str:
    T, D, K, E = shape
    name = f"{way}/{T}x{D}/top{K}of{E}"
    return name if routing == "uniform" else f"{name}/{routing}"


def case_rows(shape: Shape, routing: str, said: dict[str, Any], ranks: int) -> list[Row]:
    """A row for each way, of what `measure_shape` found."""
    bounds = SHAPES.get(shape, ((None, None), (None, None)))
    rows = []
    for way, (must, goal) in zip(("dispatch", "combine"), bounds, strict=True):
        of = {name: _summary(found, way) for name, found in said["contenders"].items()}
        name = _fastest(of, [n for n in NAMES if n in of])
        ours, found = of[name], said["contenders"][name]
        others = {n: s["p50"] for n, s in of.items() if n not in NAMES and s["p50"] is not None}
        best = _fastest(of, list(others)) if others else None
        value, remote = ours["p50"], said["remote_bytes"]
        row = {
            "name": case_name(way, shape, routing), "value": value, "unit": "us",
            "p50": value, "p99": ours["p99"], "transport": name, "chooser": said["chosen"],
            "transports": of,
            "best_peer": best, "peer_value": others.get(best or ""), "must": must, "goal": goal,
            "ratio": round(others[best] / value, 3) if best and value else None,
            "ceiling": round(remote / said["copy_bytes_per_s"] * 1e6, 1),
            "correct": found["correct"], "reason": found["reason"], "ranks": ranks,
            "graph": found.get("graph", False), "graph_p50": ours.get("graph_p50"),
            "host_syncs": found.get("host_syncs"),
            "buffer_bytes": found.get("buffer_bytes"), "remote_bytes": remote,
        }  # fmt: skip
        if value:
            rate = remote / value / 1e3
            row |= {"remote_gb_s": round(rate, 2), "of_link": round(rate / LINK_GB_S, 3)}
            row["of_copy"] = round(rate * 1e9 / said["copy_bytes_per_s"], 3)
        rows.append(row | {"bytes_over_minimum": _over_minimum(name, shape, remote, ranks)})
    return rows


def _fastest(of: dict[str, Any], names: list[str]) -> str:
    """Of those that were right; the first if none was."""
    return min(names, key=lambda name: of[name]["p50"] or float("inf"))


def _summary(found: dict[str, Any], way: str) -> dict[str, Any]:
    samples, graph = sorted(found[way]), sorted(found.get(f"{way}_graph", []))
    if not samples:
        return {"p50": None, "p99": None, "reason": found["reason"]}
    p99 = samples[min(len(samples) - 1, len(samples) * 99 // 100)]
    said = {"p50": round(samples[len(samples) // 2], 1), "p99": round(p99, 1)}
    if graph:
        said["graph_p50"] = round(graph[len(graph) // 2], 1)
    why = found.get("graph_reason")
    return said | ({"graph_reason": why} if why else {})


def _over_minimum(name: str, shape: Shape, remote: int, ranks: int) -> float | None:
    """Row bytes that a rank sends to others, over those it must send."""
    T, D, K, E = shape
    slots = slots_of_rank(T, Placement.contiguous(E, ranks), K, 2.0)
    slotted = sum(slots[1:])
    rows = {"padded": slotted, "peer_memory": slotted, "gather_scatter": (ranks - 1) * T}
    itemsize = 2 if local_device(ranks) == "cuda" else 4
    if name == "all_to_all" or not remote:
        return 1.0 if remote else None
    return round(rows[name] * D * itemsize / remote, 3)


def layer_row(said: dict[str, Any], shape: Sequence[int], ranks: int) -> Row:
    took = {name: round(micros, 1) for name, micros in said["medians"].items()}
    ours = [name for name in NAMES if name in took]
    fastest = min(ours, key=took.__getitem__, default=None)
    share = round(took["alone"] / took[fastest], 3) if fastest and "alone" in took else None
    return {
        "name": LAYER_ROW, "value": share,
        "unit": "of one rank's speed at the same tokens a rank", "goal": 0.85, "ceiling": 1.0,
        "transport": fastest, "chooser": said["chosen"], "us": took, "parts": said["parts"],
        "reasons": said["reasons"], "shape": list(shape), "ranks": ranks,
        "tflop_s": said["tflop_s"],
    }  # fmt: skip


def failed_row(name: str, reason: str, ranks: int) -> Row:
    """Of a case of which nothing could be measured."""
    return {"name": name, "value": None, "correct": False, "reason": reason, "ranks": ranks}


def shown(row: Row) -> str:
    if "reason" in row and "transports" not in row:
        return f"{row['name']}: {row['reason']}"
    if row["name"].startswith(LAYER_ROW):
        said = f"us {row['us']}, parts {row['parts']}, {row['reasons'] or ''}"
        return f"{row['name']}: {row['value']} {row['unit']} ({row['transport']}), {said}"
    others = ", ".join(f"{n} {s['p50'] or s['reason']}" for n, s in row["transports"].items())
    return (
        f"{row['name']}: p50 {row['value']} p99 {row['p99']} us by {row['transport']}, must "
        f"{row['must']}, goal {row['goal']}, copy {row['ceiling']} | {others}"
    )
