"""The rows of benchmarks.dense_routing: everything that is measured of one setting."""

import statistics
from collections.abc import Iterable, Mapping

from benchmarks.depth_bench import Bench, TimeOver
from benchmarks.depth_lanes import known
from benchmarks.depth_measure import executed
from benchmarks.depth_speed import (
    Contender,
    Pass,
    inference_mib,
    joules_per_1000,
    milliseconds,
    passes,
    training_mib,
)
from benchmarks.depth_tasks import Setting, settings
from benchmarks.results import Row
from moe_router.training.loop import Trainer

BATCHES = {"cpu": (16, 64, 256), "cuda": (64, 256, 512)}  # sequences; each has its fastest
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

    def complete(self, name: str) -> bool:
        """Whether all seeds of a row were saved before."""
        found = known(self._old, f"{self.bench.name}/{name}", self.bench)
        return set(self.seeds) <= found.keys()

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

    def _contender(self, name: str) -> Contender:
        trainer = self._trainer(name)
        return Contender(trainer.model, trainer.config)

    def _executed(self, setting: Setting) -> Row:
        ours, dense = (self._contender(name) for name in (setting.name, "dense"))
        of = executed(ours.model, ours.config, self.bench.counted())
        full = executed(dense.model, dense.config, self.bench.counted()).dense
        return {
            "flops_p5_p50_p95": [round(x) for x in of.percentiles],
            "flops": round(of.mean),
            "flops_dense": round(full),
            "flops_speedup": round(full / of.mean, 3),
            "router_flops": round(of.router),
        }

    def _speed(self, setting: Setting) -> Row:
        """One sequence, and as many a second as each of the two reaches at its own best batch."""
        both = {"ours": self._contender(setting.name), "dense": self._contender("dense")}
        runs, graphs = passes(both, self.bench.batch(1))
        (ms, p90), (dense_ms, _) = milliseconds(runs, seconds=self.seconds).values()
        one = {"ms": round(ms, 3), "p90": round(p90, 3), "speedup": round(dense_ms / ms, 3)}
        pace: dict[str, dict[int, float]] = {"ours": {}, "dense": {}}
        ready: dict[str, dict[int, Pass]] = {"ours": {}, "dense": {}}
        for rows in BATCHES[self.bench.device]:
            batch = self.bench.batch(rows)
            runs, _ = passes(both, batch)
            B = batch.offsets_B1.numel() - 1
            for name, (took, _) in milliseconds(runs, seconds=self.seconds / 2).items():
                pace[name][B], ready[name][B] = 1e3 * B / took, runs[name]
        (ours, at), (dense, dense_at) = (
            max((per_second, batch) for batch, per_second in pace[name].items())
            for name in ("ours", "dense")
        )
        many = {
            "per_second": round(ours, 1), "batch": at, "dense_per_second": round(dense, 1),
            "dense_batch": dense_at, "speedup": round(ours / dense, 3),
            "joules_per_1000": joules_per_1000(ready["ours"][at], at),
            "dense_joules_per_1000": joules_per_1000(ready["dense"][dense_at], dense_at),
        }  # fmt: skip
        return {"one": one, "many": many, "graphs": graphs}

    def _memory(self, setting: Setting) -> Row:
        batch, many = self.bench.batch(64), self.bench.batch(256)
        ours, dense = (self._contender(name) for name in (setting.name, "dense"))
        parameters = dict(ours.model.named_parameters())
        routers = [p.numel() for name, p in parameters.items() if "router" in name]
        return {
            "inference_mib": inference_mib(ours, many),
            "inference_mib_dense": inference_mib(dense, many),
            "training_mib": training_mib(ours, batch),
            "training_mib_dense": training_mib(dense, batch),
            "router_parameters": sum(routers),
            "parameters": sum(p.numel() for p in parameters.values()),
        }


def _ratio(part: float, whole: float) -> float:
    """0 where a model that knows nothing (Matthews 0) leaves nothing to retain."""
    return round(part / whole, 4) if whole else 0.0


def _mean(values: Iterable[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return round(statistics.mean(there), 5) if there else None
