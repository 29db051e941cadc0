"""Our kernels beside the peers on one GPU: routing, the SwiGLU layer, what autograd keeps.

    python -m benchmarks.kernels [--only PATTERN] [--with NAMES] [--peers DIR] [--save]

Every contender is checked against fp64 at the size that is timed, then all are timed in turn in
one process, each sample with a cold L2 cache. A layer starts from given ids and weights. What
depends on the ids alone is made beforehand where the contender's API allows it: not for moe-ops,
Liger, transformers and torch's grouped_mm (torchtitan sorts inside its layer). A peer that is not
installed or fails stands in the row with its reason.
"""

import argparse
import fnmatch
import json
import site
import time
from pathlib import Path
from typing import Any

from benchmarks import peers
from benchmarks.kernel_shapes import (
    DECODES,
    DRAWN,
    GROUPS,
    KINDS,
    LAYERS,
    PERMUTES,
    ROUTES,
    decode_name,
    layer_name,
    names,
    route_name,
)
from benchmarks.peers.base import Peer
from benchmarks.results import Row, provenance, save


def line_up(wanted: list[str]) -> dict[str, Peer | str]:
    """Ours first; a peer that cannot be imported is a reason."""
    from benchmarks.peers import ours

    found: dict[str, Peer | str] = {"moe_router": ours.PEER}
    for name in peers.NAMES:
        if name not in wanted:
            found[name] = "left out of this run"
            continue
        try:
            found[name] = peers.load(name)
        except Exception as problem:  # a peer breaks in its own way; the reason is its line
            found[name] = f"not installed: {type(problem).__name__}: {problem}"[:160]
    return found


def micro(result: Any, slow: bool) -> float | None:
    if result.timing is None:
        return None
    return round(float(result.timing.p90 if slow else result.timing.median), 2)


def rate_of(flop: float) -> Any:
    """TFLOP/s of what takes `flop`."""

    def rate(result: Any, slow: bool) -> float | None:
        took = micro(result, slow)
        return None if took is None else round(flop / took / 1e6, 1)

    return rate


def route_rows(of: Any, chosen: set[str], origin: Row) -> Any:
    from benchmarks.contest import row
    from benchmarks.kernel_rows import measure_groups, measure_route

    cases: list[tuple[str, tuple[int, ...], int]]
    cases = [("route", shape, goal) for shape, goal in ROUTES.items()]
    cases += [("route_permute", shape, goal) for shape, goal in PERMUTES.items()]
    cases += [("route_groups", shape, goal) for shape, goal in GROUPS.items()]
    for kind, shape, goal in cases:
        E, K, T, *width = shape
        name, eager = route_name(kind, shape), route_name("route_eager", shape)
        if not {name, eager} & chosen or of.deadline.over():
            continue
        # logits in; ids, weights, src, choice and row out; then x in and its rows out
        least = T * E * 4 + T * K * 20 + sum(T * D * 2 * (1 + K) for D in width)
        same = {"ceiling": least / of.field.copy / 1e3, "peers": of.field.peers}
        if kind == "route_groups":
            limited = measure_groups(of.field, (E, K, T))
            yield [row(name, "us", limited, micro, goal=goal, **same) | origin]
            continue
        graph, host = measure_route(of.field, (E, K, T), width[0] if width else None)
        rows = [row(name, "us", graph, micro, goal=goal, **same)]
        if kind == "route":
            rows.append(row(eager, "us", host, micro, goal=60, **same))
        yield [one | origin for one in rows]


def layer_rows(of: Any, chosen: set[str], origin: Row) -> Any:
    from benchmarks.contest import row
    from benchmarks.kernel_rows import measure_layer

    for shape, goals in LAYERS.items():
        kinds = {kind for kind in KINDS if layer_name(kind, shape) in chosen}
        if not kinds or of.deadline.over():
            continue
        T, D, F, _, K = shape
        results = measure_layer(of.field, shape, kinds)
        rows = []
        for kind, times, goal in zip(KINDS[:2], (6, 18), goals[:2], strict=True):
            if kind in results:
                how = {"ceiling": of.field.matmul, "goal": goal, "peers": of.field.peers}
                rate = rate_of(times * T * K * D * F)
                rows.append(row(layer_name(kind, shape), "TFLOP/s", results[kind], rate, **how))
        for kind in KINDS[2:]:
            if kind not in kinds:
                continue

            def kept(result: Any, slow: bool, kind: str = kind) -> float | None:
                size = getattr(result, kind)
                return None if size is None else round(size / 2**20, 1)

            least = (T * D + T * K * 2 * F) * 2 / 2**20
            how = {"ceiling": least, "goal": None, "peers": of.field.peers}
            if kind == "saved":
                how["goal"] = goals[2]
            results_of = results["forward_backward"]
            rows.append(row(layer_name(kind, shape), "MiB", results_of, kept, **how))
        yield [one | origin for one in rows]


def drawn_rows(of: Any, chosen: set[str], origin: Row) -> Any:
    from benchmarks.contest import row
    from benchmarks.kernel_rows import measure_drawn

    for place in DRAWN:
        if f"drawn/{place}" not in chosen or of.deadline.over():
            continue
        shape = list(LAYERS)[place]
        drawn, results = measure_drawn(of.field, shape, seed=of.seed + place)
        (T, D, F, _, K), (t, d, f, _, k) = drawn, shape
        # each by its own size; the row's goal is nine tenths of the neighbour's rate
        near = rate_of(6 * t * k * d * f)(results.pop("neighbour"), False)
        how = {"ceiling": of.field.matmul, "goal": near and round(0.9 * near, 1), "peers": {}}
        how["peers"] = {"moe_router": of.field.peers["moe_router"]}
        mine = {"moe_router": results["drawn"]}
        one = row(f"drawn/{place}", "TFLOP/s", mine, rate_of(6 * T * K * D * F), **how)
        yield [one | origin | {"shape": drawn, "neighbour": shape, "neighbour_value": near}]


def decode_rows(of: Any, chosen: set[str], origin: Row) -> Any:
    from benchmarks.contest import row
    from benchmarks.kernel_rows import measure_decode, measure_decode_layer

    for shape, goal in DECODES.items():
        T, D, F, E, K = shape
        # the weights of the experts that are hit, once
        least = 3 * D * F * 2 * E * (1 - (1 - K / E) ** T) / of.field.copy / 1e3
        for kind, measure in (("decode", measure_decode), ("decode_layer", measure_decode_layer)):
            name = decode_name(kind, shape)
            if name not in chosen or of.deadline.over():
                continue
            results = measure(of.field, shape)
            peers_of = {key: of.field.peers[key] for key in results}
            how = {"ceiling": least, "goal": goal if kind == "decode" else None, "peers": peers_of}
            yield [row(name, "us", results, micro, **how) | origin]


def shown(row: Row) -> str:
    peers_of = ", ".join(
        f"{name} {entry['value']}" if "value" in entry else f"{name} -"
        for name, entry in row["peers"].items()
    )
    return (
        f"{row['name']}: {row['value']} {row['unit']} ({row['reason'] or row['mode']}) | {peers_of}"
    )


class Setting:
    """The field of contenders, the time they have, and the seed of the shapes drawn."""

    def __init__(self, field: Any, deadline: Any, seed: int) -> None:
        self.field, self.deadline, self.seed = field, deadline, seed


def measure(args: argparse.Namespace, chosen: set[str]) -> None:
    import triton

    from benchmarks import timing
    from benchmarks.compile_ahead import quick_tuning
    from benchmarks.contest import Field

    quick_tuning()
    field = Field(line_up(args.contenders), timing.matmul_ceiling(), timing.copy_ceiling())
    if args.ready:
        field.untuned = {k: set(v) for k, v in json.loads(Path(args.ready).read_text()).items()}
    print(f"ceilings: {field.matmul:.0f} TFLOP/s, {field.copy:.0f} GB/s", flush=True)
    origin = provenance("cuda") | {"triton": triton.__version__}
    setting = Setting(field, timing.Deadline(args.seconds), int(time.time()))
    for part in (route_rows, layer_rows, drawn_rows, decode_rows):
        for rows in part(setting, chosen, origin):
            print("\n".join(map(shown, rows)), flush=True)
            if args.save:
                save("kernels", [one for one in rows if one["name"] in chosen])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="*", help="rows by shell pattern, several by commas")
    parser.add_argument("--with", dest="contenders", default=",".join(peers.NAMES))
    parser.add_argument("--peers", help="folder of unpacked peers, searched after the installed")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no row after these")
    parser.add_argument("--ready", help="JSON of compile_ahead: shapes a peer is left out of")
    parser.add_argument("--dry", action="store_true", help="list rows and peers, measure nothing")
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    args.contenders = args.contenders.split(",")
    if args.peers:
        site.addsitedir(args.peers)
    patterns = args.only.split(",")
    chosen = {n for n in names() if any(fnmatch.fnmatch(n, p) for p in patterns)}
    if args.dry:
        print("\n".join(n for n in names() if n in chosen))
        for name, peer in line_up(args.contenders).items():
            print(f"{name}: {peer if isinstance(peer, str) else peer.version()}")
        return
    measure(args, chosen)


if __name__ == "__main__":
    main()
