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
from pathlib import Path
from typing import Any

from benchmarks import peers
from benchmarks.peers.base import Peer
from benchmarks.results import Row, provenance, save

LAYERS = {  # T, D, F, E, K: goals of forward and of forward + backward, TFLOP/s, saved MiB
    (24576, 1536, 256, 128, 8): (420, 350, 268),
    (32768, 4096, 512, 128, 8): (480, 555, 773),
    (32768, 4096, 1024, 128, 8): (560, 570, None),
    (16384, 4096, 14336, 8, 2): (655, 570, None),
    (32768, 2048, 768, 128, 8): (520, 500, None),
}
ROUTES = {(128, 8, 1): 6, (128, 8, 256): 8, (128, 8, 4096): 14, (128, 8, 32768): 30}
PERMUTES = {(128, 8, 32768, 2048): 443}
KINDS = ("forward", "forward_backward", "saved")


def layer_name(kind: str, shape: tuple[int, ...]) -> str:
    return "/".join([kind, *map(str, shape)])


def names() -> list[str]:
    routes = [f"{kind}/E{E}/K{K}/T{T}" for E, K, T in ROUTES for kind in ("route", "route_eager")]
    permutes = [f"route_permute/E{E}/K{K}/T{T}/D{D}" for E, K, T, D in PERMUTES]
    return routes + permutes + [layer_name(kind, shape) for shape in LAYERS for kind in KINDS]


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


def route_rows(of: Any, chosen: set[str], origin: Row) -> Any:
    from benchmarks.kernel_rows import measure_route, row

    def micro(result: Any, slow: bool) -> float | None:
        if result.timing is None:
            return None
        return round(float(result.timing.p90 if slow else result.timing.median), 2)

    cases: list[tuple[tuple[int, int, int], int | None, float]]
    cases = [(shape, None, goal) for shape, goal in ROUTES.items()]
    cases += [(shape[:3], shape[3], goal) for shape, goal in PERMUTES.items()]
    for shape, width, goal in cases:
        E, K, T = shape
        tail = f"E{E}/K{K}/T{T}"
        name = f"route/{tail}" if width is None else f"route_permute/{tail}/D{width}"
        eager = f"route_eager/{tail}"
        if not {name, eager} & chosen or of.deadline.over():
            continue
        # logits in; ids, weights, src, choice and row out; then x in and its rows out
        least = T * E * 4 + T * K * 20 + (0 if width is None else T * width * 2 * (1 + K))
        graph, host = measure_route(of.field, shape, width)
        same = {"ceiling": least / of.field.copy / 1e3, "peers": of.field.peers}
        rows = [row(name, "us", graph, micro, goal=goal, **same)]
        if width is None:
            rows.append(row(eager, "us", host, micro, goal=60, **same))
        yield [one | origin for one in rows]


def layer_rows(of: Any, chosen: set[str], origin: Row) -> Any:
    from benchmarks.kernel_rows import measure_layer, row

    for shape, goals in LAYERS.items():
        kinds = {kind for kind in KINDS if layer_name(kind, shape) in chosen}
        if not kinds or of.deadline.over():
            continue
        T, D, F, _, K = shape
        results = measure_layer(of.field, shape, kinds)
        rows = []
        for kind, times, goal in zip(KINDS[:2], (6, 18), goals[:2], strict=True):
            if kind not in results:
                continue

            def rate(result: Any, slow: bool, flop: int = times * T * K * D * F) -> float | None:
                if result.timing is None:
                    return None
                took = float(result.timing.p90 if slow else result.timing.median)
                return round(flop / took / 1e6, 1)

            rows.append(
                row(
                    layer_name(kind, shape), "TFLOP/s", results[kind], rate,
                    ceiling=of.field.matmul, goal=goal, peers=of.field.peers,
                )
            )  # fmt: skip
        if "saved" in kinds:
            least = (T * D + T * K * 2 * F) * 2 / 2**20
            rows.append(
                row(
                    layer_name("saved", shape), "MiB", results["forward_backward"],
                    lambda result, slow: result.saved and round(result.saved / 2**20, 1),
                    ceiling=least, goal=goals[2], peers=of.field.peers,
                )
            )  # fmt: skip
        yield [one | origin for one in rows]


def shown(row: Row) -> str:
    peers_of = ", ".join(
        f"{name} {entry['value']}" if "value" in entry else f"{name} -"
        for name, entry in row["peers"].items()
    )
    return (
        f"{row['name']}: {row['value']} {row['unit']} ({row['reason'] or row['mode']}) | {peers_of}"
    )


class Setting:
    """The field of contenders and the time they have."""

    def __init__(self, field: Any, deadline: Any) -> None:
        self.field, self.deadline = field, deadline


def measure(args: argparse.Namespace, chosen: set[str]) -> None:
    import triton

    from benchmarks import timing
    from benchmarks.compile_ahead import quick_tuning
    from benchmarks.kernel_rows import Field

    quick_tuning()
    field = Field(line_up(args.contenders), timing.matmul_ceiling(), timing.copy_ceiling())
    if args.ready:
        field.untuned = {k: set(v) for k, v in json.loads(Path(args.ready).read_text()).items()}
    print(f"ceilings: {field.matmul:.0f} TFLOP/s, {field.copy:.0f} GB/s", flush=True)
    origin = provenance("cuda") | {"triton": triton.__version__}
    setting = Setting(field, timing.Deadline(args.seconds))
    for part in (route_rows, layer_rows):
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
