"""Routing in depth on dense layers: quality, executed FLOPs, wall-clock, memory, controls.

    python -m benchmarks.dense_routing --data DIR --seeds 0,1,2 --save
    python -m benchmarks.dense_routing --data DIR --seeds 0,1,2 --save --device cuda --seconds 300

DIR holds a folder for each task, see `benchmarks.depth_files`; --only says which rows. The runs of
a task and a seed are one process, up to --workers side by side: small models leave a GPU idle most
of the time. Then each row is measured alone, and saved as it comes. Trainings are kept under --runs
and gone on with; rows and seeds that are saved are not made again.
Speed is that of the full dense model with the same kernels and the same padding-free batch, timed
in turn with the routed one. `benchmarks.dense_routing_table` writes docs/results/dense_routing.md.
"""

import argparse
import dataclasses
import fnmatch
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.by_seed import saved
from benchmarks.depth_bench import TimeOver, one_thread
from benchmarks.depth_files import files_of, folders
from benchmarks.depth_lanes import Lane, bench_of, known, needed, run_lanes, stage, with_data
from benchmarks.depth_rows import Rows
from benchmarks.depth_tasks import TASKS, settings
from benchmarks.results import Row, provenance, save
from benchmarks.timing import Deadline

FILE = "dense_routing"
TRAINING = 0.7  # of the seconds; what is left is for measuring


def shown(row: Row) -> str:
    one, many = row["one"], row["many"]
    return (
        f"{row['name']}: {row['value']:.4f} (retained {row['retained']:.4f}), "
        f"FLOPs / {row['flops_speedup']}; batch 1: {one['ms']} ms, x{one['speedup']}; "
        f"batch {many['batch']}: {many['per_second']} a second, x{many['speedup']}; "
        f"{row['training_mib']} MiB"
    )


def wanted(args: argparse.Namespace, name: str) -> list[str]:
    """The rows of a task that --only names."""
    patterns = args.only.split(",")
    rows = [s.name for s in settings(TASKS[name])]
    return [r for r in rows if any(fnmatch.fnmatch(f"{name}/{r}", p) for p in patterns)]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="a folder for each task in it")
    parser.add_argument("--only", default="*", help="rows by shell pattern, several by commas")
    parser.add_argument("--runs", type=Path, default=Path("runs/dense_routing"))
    parser.add_argument("--seeds", default="0", help="by commas")
    parser.add_argument("--seconds", type=float, default=1e9, help="of the whole: then it ends")
    parser.add_argument("--timing", type=float, default=4.0, help="seconds for each batch")
    parser.add_argument("--workers", type=int, default=1, help="processes that train")
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of steps")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args(arguments)
    one_thread()
    end, training = Deadline(args.seconds), Deadline(TRAINING * args.seconds)
    origin = provenance(args.device)
    old = saved(FILE, origin["device"])
    seeds = [int(seed) for seed in args.seeds.split(",")]
    tasks = [
        (with_data(lane, bench), bench, wanted(args, lane.task))
        for lane in lanes_of(args, training)
        for bench in [bench_of(lane)]
    ]
    runs = []
    for lane, bench, names in tasks:
        missing = [
            (seed, name)
            for seed in seeds
            for name in names
            if seed not in known(old, f"{lane.task}/{name}", bench)
        ]
        runs += [
            (stage(setting), dataclasses.replace(lane, row=setting.name, seed=seed))
            for seed in seeds
            for setting in needed(bench, [name for of, name in missing if of == seed])
        ]
    run_lanes(runs, args.workers)
    for _, bench, names in tasks:
        measure(Rows(bench, seeds, args.timing, old), names, args, end, origin)


def lanes_of(args: argparse.Namespace, training: Deadline) -> Iterator[Lane]:
    """Of each task of which rows are wanted."""
    for name, folder in folders(args.data).items():
        if wanted(args, name):
            more = (*files_of(name, folder, args.runs), *args.set)
            yield Lane(name, args.runs, folder, more, args.device, args.scale, training)


def measure(
    rows: Rows, names: Sequence[str], args: argparse.Namespace, end: Deadline, origin: Row
) -> None:
    """The rows of a task, each saved as it comes."""
    for name in names:
        full = f"{rows.bench.name}/{name}"
        if rows.complete(name):
            continue
        if end.over():
            print(f"{full}: the time is over", flush=True)
            return
        try:
            row = rows.row(name) | origin
        except TimeOver as error:
            print(f"{full}: {error}", flush=True)
            continue
        print(shown(row), flush=True)
        if args.save:
            save(FILE, [row])


if __name__ == "__main__":
    main()
