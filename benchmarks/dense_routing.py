"""Routing in depth on dense layers: quality, executed FLOPs, wall-clock, memory, controls.

    python -m benchmarks.dense_routing --fashion DIR --sst2 DIR --runs runs/dense_routing --save

Rows come one by one and are saved as they come; trainings are kept under --runs and gone on with.
Speed is that of the full dense model with the same kernels and the same padding-free batch, timed
in turn with the routed one. `benchmarks.dense_routing_table` writes docs/results/dense_routing.md.
"""

import argparse
import fnmatch
import statistics
from pathlib import Path
from typing import Any

from benchmarks.depth_bench import Bench, one_thread, quality, soft_gap
from benchmarks.depth_measure import Model, executed, milliseconds, training_mib
from benchmarks.depth_tasks import TASKS, Setting, settings
from benchmarks.results import Row, provenance, save
from moe_router.config import DataConfig
from moe_router.models import CausalLM
from moe_router.training.data import make_tokenizer
from moe_router.training.loop import Trainer

BATCHES = (16, 64, 256)  # sequences; of these each model has its fastest
VOCAB = 4000  # of the tokenizer that is made of the training sentences


class Rows:
    """Args:
    bench: of one task.
    seeds: of the quality; FLOPs, time and memory are those of the first.
    seconds: of timing, for each row and batch.
    """

    def __init__(self, bench: Bench, seeds: list[int], seconds: float) -> None:
        self.bench, self.seeds, self.seconds = bench, seeds, seconds
        self._settings = {s.name: s for s in settings(bench.task)}
        self._trainers: dict[tuple[str, int], Trainer] = {}
        self._qualities: dict[tuple[str, int], float] = {}

    def row(self, name: str) -> Row:
        """Everything about one row, but for where and when."""
        setting = self._settings[name]
        mine, rivals = (
            [self._quality(n, seed) for seed in self.seeds] for n in (name, setting.rival)
        )
        mean, rival = statistics.mean(mine), statistics.mean(rivals)
        text = isinstance(self._model(name)[0], CausalLM)  # of bits the fewer are the better
        return {
            "name": f"{self.bench.name}/{name}",
            "value": round(mean, 4),
            "unit": "bits per byte" if text else "accuracy",
            "seeds": [round(v, 4) for v in mine],
            "mean": round(mean, 4),
            "std": round(statistics.stdev(mine), 4) if len(mine) > 1 else None,
            "rival": f"{self.bench.name}/{setting.rival}",
            "retained": round(rival / mean if text else mean / rival, 4),
            "soft_gap": self._soft_gap(setting),
            "noun": self.bench.task.noun,
            **self._executed(setting),
            **self._speed(setting),
            **self._memory(setting),
        }

    def _trainer(self, name: str, seed: int) -> Trainer:
        key = (name, seed)
        if key not in self._trainers:
            setting, flops = self._settings[name], None
            if setting.equal_to is not None:
                flops = executed(*self._model(setting.equal_to), self.bench.counted()).mean
            self._trainers[key] = self.bench.trained(setting, seed, flops)
        return self._trainers[key]

    def _model(self, name: str) -> tuple[Model, Any]:
        trainer = self._trainer(name, self.seeds[0])
        return trainer.model, trainer.config

    def _quality(self, name: str, seed: int) -> float:
        key = (name, seed)
        if key not in self._qualities:
            self._qualities[key] = quality(self._trainer(name, seed))
        return self._qualities[key]

    def _soft_gap(self, setting: Setting) -> float | None:
        """Nats, mean over the seeds; None where no threshold was ever soft."""
        routing = setting.routing
        if routing is None or routing.kind != "halt" or routing.halting == "act":
            return None
        gaps = [soft_gap(self._trainer(setting.name, seed)) for seed in self.seeds]
        return round(statistics.mean(gaps), 5)

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


def files_of(name: str, folder: Path, runs: Path) -> tuple[str, ...]:
    """Keys of the config that say where the data of a task lies."""
    if name == "enwik8":
        return (f"data.path={folder / 'enwik8.xz'}",)
    if name == "cifar":
        file = folder / "cifar10_jpeg.npz"
        return (f"data.path={file}", f"data.val_path={file}")
    if name == "fashion":
        images = [folder / f"{part}-images-idx3-ubyte" for part in ("train", "t10k")]
        found = [p if p.exists() else p.with_name(p.name + ".gz") for p in images]
        return (f"data.path={found[0]}", f"data.val_path={found[1]}")
    files, labels = ("stsa.binary.train", "stsa.binary.dev"), ("0", "1")
    if name == "imdb":
        files = ("train.jsonl.xz", "test.jsonl.xz")
    train, held_out = (folder / file for file in files)
    tokenizer = runs / f"{name}.json"
    if not tokenizer.exists():
        runs.mkdir(parents=True, exist_ok=True)
        texts = DataConfig(source="labelled", path=str(train), labels=labels)
        make_tokenizer(texts, VOCAB, tokenizer)
    return (f"data.path={train}", f"data.val_path={held_out}", f"data.tokenizer={tokenizer}")


def shown(row: Row) -> str:
    one, many = row["one"], row["many"]
    return (
        f"{row['name']}: {row['value']:.4f} (retained {row['retained']:.4f}), "
        f"FLOPs / {row['flops_speedup']}; batch 1: {one['ms']} ms, x{one['speedup']}; "
        f"batch {many['batch']}: {many['per_second']} a second, x{many['speedup']}; "
        f"{row['training_mib']} MiB"
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name in TASKS:
        parser.add_argument(f"--{name}", type=Path, help="folder of its files")
    parser.add_argument("--only", default="*", help="rows by shell pattern, several by commas")
    parser.add_argument("--runs", type=Path, default=Path("runs/dense_routing"))
    parser.add_argument("--seeds", default="0", help="by commas")
    parser.add_argument("--seconds", type=float, default=4.0, help="of timing for each batch")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args(arguments)
    one_thread()
    origin = provenance(args.device)
    for name, task in TASKS.items():
        if (folder := getattr(args, name)) is None:
            continue
        chosen = [
            s.name
            for s in settings(task)
            if any(fnmatch.fnmatch(f"{name}/{s.name}", p) for p in args.only.split(","))
        ]
        overrides = (*files_of(name, folder, args.runs), *args.set)
        bench = Bench(name, args.runs, overrides, args.device)
        rows = Rows(bench, [int(seed) for seed in args.seeds.split(",")], args.seconds)
        for row_name in chosen:
            row = rows.row(row_name) | origin
            print(shown(row), flush=True)
            if args.save:
                save("dense_routing", [row])


if __name__ == "__main__":
    main()
