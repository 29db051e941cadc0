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
import fnmatch
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.by_seed import saved
from benchmarks.depth_bench import Bench, TimeOver, one_thread
from benchmarks.depth_files import files_of, folders
from benchmarks.depth_lanes import Lane, bench_of, known, run_lanes
from benchmarks.depth_measure import Model, executed, milliseconds, training_mib
from benchmarks.depth_tasks import TASKS, Setting, settings
from benchmarks.results import Row, provenance, save
from benchmarks.timing import Deadline
from moe_router.training.loop import Trainer

FILE = "dense_routing"
BATCHES = (16, 64, 256)  # sequences; of these each model has its fastest
TRAINING = 0.7  # of the seconds; what is left is for measuring
UNITS = {"accuracy": "accuracy", "matthews": "Matthews", "bits_per_byte": "bits per byte"}


class Rows:
    """Args:
    bench: of one task.
    seeds: of the quality; FLOPs, time and memory are those of the first.
    seconds: of timing, for each row and batch.
    old: rows saved before, by name: seeds that they have are not trained again.
    """

    def __init__(
        self, bench: Bench, seeds: list[int], seconds: float, old: Mapping[str, Row]
    ) -> None:
        self.bench, self.seeds, self.seconds = bench, seeds, seconds
        self._old = old
        self._settings = {s.name: s for s in settings(bench.task)}
        self._trainers: dict[tuple[str, int], Trainer] = {}

    def row(self, name: str) -> Row:
        """Everything about one row, but for where and when.

        Raises:
            TimeOver: no seed of it, or of its rival, is there.
        """
        setting = self._settings[name]
        mine, rivals = self._by_seed(name), self._by_seed(setting.rival)
        common = sorted(mine.keys() & rivals.keys())
        value, rival = (
            statistics.mean(of[seed]["quality"] for seed in common) for of in (mine, rivals)
        )
        values = [mine[seed]["quality"] for seed in common]
        unit = UNITS[self.bench.task.metric]
        fewer = unit == "bits per byte"  # are better
        return {
            "name": f"{self.bench.name}/{name}",
            "value": round(value, 4),
            "unit": unit,
            "seeds": [round(v, 4) for v in values],
            "by_seed": {str(seed): mine[seed] for seed in common},
            "of": self.bench.about,
            "mean": round(value, 4),
            "std": round(statistics.stdev(values), 4) if len(values) > 1 else None,
            "rival": f"{self.bench.name}/{setting.rival}",
            "retained": _ratio(rival, value) if fewer else _ratio(value, rival),
            "soft_gap": _mean(mine[seed].get("gap") for seed in common),
            "elsewhere": self._elsewhere([mine[seed] for seed in common]),
            "noun": self.bench.task.noun,
            **self._executed(setting),
            **self._speed(setting),
            **self._memory(setting),
        }

    def _by_seed(self, name: str) -> dict[int, Row]:
        """What was measured of the runs that are there, or can be trained in time."""
        found, late = known(self._old, f"{self.bench.name}/{name}", self.bench), None
        for seed in self.seeds:
            if seed not in found:
                try:
                    found[seed] = self.bench.measured(self._settings[name], seed)
                except TimeOver as error:
                    late = error
        if late is not None and not found:
            raise late
        return found

    @staticmethod
    def _elsewhere(measured: list[Row]) -> Row | None:
        """Of data from somewhere else, mean over the seeds."""
        there = [m["elsewhere"] for m in measured if "elsewhere" in m]
        if not there:
            return None
        return {key: _mean(of[key] for of in there) for key in ("quality", "executed")}

    def _trainer(self, name: str) -> Trainer:
        key = (name, self.seeds[0])
        if key not in self._trainers:
            setting, flops = self._settings[name], None
            if setting.equal_to is not None:
                flops = self.bench.flops_of(setting.equal_to, self.seeds[0])
            self._trainers[key] = self.bench.trained(setting, self.seeds[0], flops)
        return self._trainers[key]

    def _model(self, name: str) -> tuple[Model, Any]:
        trainer = self._trainer(name)
        return trainer.model, trainer.config

    def _executed(self, setting: Setting) -> Row:
        of = executed(*self._model(setting.name), self.bench.counted())
        full = executed(*self._model("dense"), self.bench.counted()).dense
        return {
            "flops_p5_p50_p95": [round(x) for x in of.percentiles],
            "flops": round(of.mean),
            "flops_dense": round(full),
            "flops_speedup": round(full / of.mean, 3),
            "router_flops": round(of.router),
        }

    def _speed(self, setting: Setting) -> Row:
        """One sequence, and as many a second as each of the two reaches at its own best batch."""
        models = {"ours": self._model(setting.name)[0], "dense": self._model("dense")[0]}
        (ms, p90), (dense_ms, _) = milliseconds(
            models, self.bench.batch(1), seconds=self.seconds
        ).values()
        one = {"ms": round(ms, 3), "p90": round(p90, 3), "speedup": round(dense_ms / ms, 3)}
        pace: dict[str, dict[int, float]] = {"ours": {}, "dense": {}}
        for rows in BATCHES:
            batch = self.bench.batch(rows)
            for name, (took, _) in milliseconds(models, batch, seconds=self.seconds / 2).items():
                pace[name][rows] = 1e3 * (batch.offsets_B1.numel() - 1) / took
        (ours, at), (dense, dense_at) = (
            max((per_second, rows) for rows, per_second in pace[name].items())
            for name in ("ours", "dense")
        )
        many = {
            "per_second": round(ours, 1), "batch": at, "dense_per_second": round(dense, 1),
            "dense_batch": dense_at, "speedup": round(ours / dense, 3),
        }  # fmt: skip
        return {"one": one, "many": many}

    def _memory(self, setting: Setting) -> Row:
        batch = self.bench.batch(64)
        (model, _), (dense, _) = self._model(setting.name), self._model("dense")
        parameters = dict(model.named_parameters())
        routers = [p.numel() for name, p in parameters.items() if "router" in name]
        return {
            "training_mib": round(training_mib(model, batch), 1),
            "training_mib_dense": round(training_mib(dense, batch), 1),
            "router_parameters": sum(routers),
            "parameters": sum(p.numel() for p in parameters.values()),
        }


def _ratio(part: float, whole: float) -> float:
    """0 where a model that knows nothing (Matthews 0) leaves nothing to retain."""
    return round(part / whole, 4) if whole else 0.0


def _mean(values: Iterable[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return round(statistics.mean(there), 5) if there else None


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
    lanes = []
    for name, folder in folders(args.data).items():
        if rows := wanted(args, name):
            more = (*files_of(name, folder, args.runs), *args.set)
            how = (more, args.device, args.scale, training, tuple(rows))
            lanes += [Lane(name, args.runs, folder, *how, seed, old) for seed in seeds]
    run_lanes(lanes, args.workers)
    for lane in lanes[:: len(seeds)]:
        measure(lane, seeds, args, end, origin)


def measure(
    lane: Lane, seeds: list[int], args: argparse.Namespace, end: Deadline, origin: Row
) -> None:
    """The rows of a task, each saved as it comes."""
    bench = bench_of(lane)
    rows = Rows(bench, seeds, args.timing, lane.old)
    for name in lane.rows:
        full = f"{lane.task}/{name}"
        if set(seeds) <= known(lane.old, full, bench).keys():
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
