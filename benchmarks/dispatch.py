"""Tokens between ranks: dispatch and combine by every transport, beside plain torch and the link.

    python -m benchmarks.dispatch [--only PATTERN] [--ranks 2] [--save]

Ranks are processes of this machine: one for each GPU over NCCL, else CPU over gloo. An exact round
trip is checked before anything is timed. A value is that of the transport the chooser takes; p50
and p99 are of the slowest rank, over 5 rounds in which all contenders take turns. From x and Choice
to received rows and the local Plan; and back.
"""

import argparse
import fnmatch
from collections.abc import Sequence
from typing import Any

from benchmarks.dispatch_contenders import ROUTINGS
from benchmarks.dispatch_measure import SAMPLES, measure_layer, measure_shape
from benchmarks.results import Row, provenance, save
from moe_router.dispatch.ranks import local_device, run_here
from moe_router.dispatch.transports import ALL

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
        name = said["chosen"]
        if of[name]["p50"] is None:  # what does not fit runs by host splits
            name = "all_to_all"
        ours, found = of[name], said["contenders"][name]
        others = {n: s["p50"] for n, s in of.items() if n not in ALL and s["p50"] is not None}
        best = min(others, key=others.__getitem__, default=None)
        value, remote = ours["p50"], said["remote_bytes"]
        row = {
            "name": case_name(way, shape, routing), "value": value, "unit": "us",
            "p50": value, "p99": ours["p99"], "transport": name, "transports": of,
            "best_peer": best, "peer_value": others.get(best or ""), "must": must, "goal": goal,
            "ratio": round(others[best] / value, 3) if best and value else None,
            "ceiling": round(remote / said["copy_bytes_per_s"] * 1e6, 1),
            "correct": found["correct"], "reason": found["reason"], "ranks": ranks,
            "graph": found.get("graph"), "host_syncs": found.get("host_syncs"),
            "buffer_bytes": found.get("buffer_bytes"), "remote_bytes": remote,
        }  # fmt: skip
        if value:
            rate = remote / value / 1e3
            row |= {"remote_gb_s": round(rate, 2), "of_link": round(rate / LINK_GB_S, 3)}
            row["of_copy"] = round(rate * 1e9 / said["copy_bytes_per_s"], 3)
        rows.append(row | {"bytes_over_minimum": _over_minimum(name, shape, remote, ranks)})
    return rows


def _summary(found: dict[str, Any], way: str) -> dict[str, Any]:
    samples = sorted(found[way])
    if not samples:
        return {"p50": None, "p99": None, "reason": found["reason"]}
    p99 = samples[min(len(samples) - 1, len(samples) * 99 // 100)]
    return {"p50": round(samples[len(samples) // 2], 1), "p99": round(p99, 1)}


def _over_minimum(name: str, shape: Shape, remote: int, ranks: int) -> float | None:
    """Row bytes that a rank sends to others, over those it must send."""
    from moe_router.dispatch.where import slots_of_rank
    from moe_router.placement import Placement

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
    return {
        "name": LAYER_ROW, "value": round(took["alone"] / took[said["chosen"]], 3),
        "unit": "of one rank's speed at the same tokens a rank", "goal": 0.85, "ceiling": 1.0,
        "transport": said["chosen"], "us": took, "shape": list(shape), "ranks": ranks,
    }  # fmt: skip


def shown(row: Row) -> str:
    if row["name"] == LAYER_ROW:
        return f"{row['name']}: {row['value']} {row['unit']} ({row['transport']}), us {row['us']}"
    others = ", ".join(f"{n} {s['p50'] or s['reason']}" for n, s in row["transports"].items())
    return (
        f"{row['name']}: p50 {row['value']} p99 {row['p99']} us by {row['transport']}, must "
        f"{row['must']}, goal {row['goal']}, copy {row['ceiling']} | {others}"
    )


def _numbers(text: str) -> Any:
    return tuple(map(int, text.split(",")))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="*", help="rows by shell pattern, several by commas")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--shape", type=_numbers, help="T,D,K,E in the place of the three")
    parser.add_argument("--layer", type=_numbers, default=LAYER, help="T,D,F,E,K of weak scaling")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="in each of 5 rounds")
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args(arguments)
    kind = local_device(args.ranks)
    origin, patterns = provenance(kind), args.only.split(",")

    def wanted(name: str) -> bool:
        return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)

    def keep(rows: list[Row]) -> None:
        rows = [row | origin for row in rows if wanted(row["name"])]
        print("\n".join(map(shown, rows)), flush=True)
        if args.save:
            save("dispatch", rows)

    for shape in [args.shape] if args.shape else list(SHAPES):
        ways = ("dispatch", "combine")
        routings = [r for r in ROUTINGS if any(wanted(case_name(w, shape, r)) for w in ways)]
        if routings:
            said = run_here(args.ranks, kind, measure_shape, shape, routings, args.samples)
            keep([row for r in routings for row in case_rows(shape, r, said[r], args.ranks)])
    if wanted(LAYER_ROW):
        said = run_here(args.ranks, kind, measure_layer, args.layer, args.samples)
        keep([layer_row(said, args.layer, args.ranks)])


if __name__ == "__main__":
    main()
