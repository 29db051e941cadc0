"""What a fault at each point of the protocol costs, and that it leaves no trace in the weights.

    python -m benchmarks.faults [--only PATTERN] [--ranks 2] [--save]

Each row is a whole run over Ray and gloo in which a rank kills (SIGKILL) or freezes (SIGSTOP)
itself, once, in the middle of the run. `correct`: every tensor of the last checkpoint, optimizer
included, and every loss equal, bit for bit, those of an uninterrupted run of the same ranks. The
value is the time from the fault until all ranks stood at a common step: detected, and then resumed.
"""

import argparse
import fnmatch
import io
import json
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from safetensors import safe_open

from benchmarks.results import Row, provenance, save
from moe_router.config import Config
from moe_router.config_file import config_from_dict
from moe_router.observability.csv_log import read_rows
from moe_router_cluster.session import prepare_environment, ray_session

STEP, STEPS = 7, 12  # the fault comes when so many steps are committed, of so many
CHECKPOINT_EVERY = 5
SILENT_S = 4.0  # cluster.timeout_s of rows with a frozen rank: what detecting it takes


@dataclass(frozen=True, slots=True)
class Fault:
    """Attributes:
    point: of `benchmarks.fault_shard.POINTS`, or "gating service".
    ranks: that strike; empty for none.
    replicate_every: of the run.
    """

    name: str
    point: str
    how: signal.Signals
    ranks: tuple[int, ...]
    replicate_every: int = 0


def faults(ranks: int) -> list[Fault]:
    """Every row of a number of ranks."""
    from benchmarks.fault_shard import POINTS

    last = (ranks - 1,)
    kill, stop = signal.SIGKILL, signal.SIGSTOP
    found = [
        Fault(f"{how.name}/{point}/W{ranks}", point, how, last)
        for point in POINTS
        for how in (kill, stop)
    ]
    everyone = tuple(range(ranks))
    if ranks > 2:
        found.append(Fault(f"SIGKILL/two at once/W{ranks}", "before combine", kill, everyone[:2]))
    found.append(Fault(f"SIGKILL/every rank/W{ranks}", "before combine", kill, everyone))
    found.append(
        Fault(f"SIGKILL/every rank, replicas/W{ranks}", "before combine", kill, everyone, 3)
    )
    found.append(Fault(f"SIGKILL/gating service/W{ranks}", "gating service", kill, ()))
    return found


def config_of(folder: Path, name: str, ranks: int, fault: Fault | None = None) -> Config:
    """A model so small that a step takes milliseconds."""
    frozen = fault is not None and fault.how == signal.SIGSTOP
    return config_from_dict(
        {
            "run": {"name": name, "dir": str(folder), "seed": 3},
            "data": {"source": "pydoc", "seq_len": 32},
            "model": {
                "layers": 2, "dim": 32, "heads": 2, "kv_heads": 1, "hidden": 64,
                "moe": {"experts": 4, "top_k": 2, "hidden": 32},
            },
            "train": {
                "steps": STEPS, "batch": 4, "warmup": 2, "eval_rows": 4,
                "checkpoint_every": CHECKPOINT_EVERY,
            },
            "cluster": {
                "actors": ranks, "device": "cpu", "cpus_per_actor": 0.25,
                "timeout_s": SILENT_S if frozen else 30.0,
                "replicate_every": 0 if fault is None else fault.replicate_every,
            },
            "serve": {"max_new_tokens": 8},
        }
    )  # fmt: skip


Learned = tuple[dict[str, bytes], list[tuple[str, str]]]


def learned(config: Config) -> Learned:
    """Every tensor of the last checkpoint, byte for byte, and every loss."""
    folder = Path(config.run.dir) / config.run.name
    found: dict[str, bytes] = {}
    for path in sorted((folder / f"step_{STEPS}").glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            names = file.keys()
            found |= {name: file.get_tensor(name).numpy().tobytes() for name in names}
    return found, [(row["step"], row["loss"]) for row in read_rows(folder / "metrics.csv")]


def train_once(config: Config) -> dict[str, Any]:
    """One run, to its summary."""
    from moe_router_cluster.train import train

    out = io.StringIO()
    assert train(config, Console(file=out, width=200)), out.getvalue()
    summary = Path(config.run.dir) / config.run.name / "summary.json"
    facts: dict[str, Any] = json.loads(summary.read_text())
    return facts


@contextmanager
def faulty_ranks() -> Iterator[None]:
    """Runs get actors that obey `fault_shard.order`."""
    from benchmarks.fault_shard import FaultyShardActor
    from moe_router_cluster import shard_group

    with _replaced(shard_group, "ExpertShardActor", FaultyShardActor):
        yield


def measure(fault: Fault, folder: Path, ranks: int, clean: Learned) -> Row:
    """A run with the fault in it."""
    config = config_of(folder, fault.name.replace("/", "-").replace(" ", "_"), ranks, fault)
    run_dir = folder / config.run.name
    ended: list[float] = []
    with faulty_ranks(), _at_recovery(lambda: ended.append(time.time())):
        if fault.ranks:
            from benchmarks.fault_shard import order, struck_at

            order(run_dir, fault.point, STEP, fault.how, list(fault.ranks))
            facts = train_once(config)
            struck = struck_at(run_dir)
            assert struck is not None, f"{fault.name}: never came to {fault.point}"
        else:
            with _gating_killed(config.run.name):
                facts = train_once(config)
            struck = None
    same = learned(config) == clean
    row: Row = {"name": fault.name, "unit": "s", "ranks": ranks}
    if struck is None:  # nobody waits for it: there is nothing to recover from
        return row | {"value": 0.0, "correct": same and facts["recoveries"] == 0}
    from_step = facts["recovery_log"][-1]["from_step"]
    same = same and (not fault.replicate_every or from_step > CHECKPOINT_EVERY)  # the replica
    total = ended[-1] - struck
    resume = sum(each["seconds"] for each in facts["recovery_log"])
    return row | {
        "value": round(total, 2),
        "detect_s": round(total - resume, 2),
        "resume_s": round(resume, 2),
        "from_step": from_step,
        "recoveries": facts["recoveries"],
        "correct": same and facts["recoveries"] >= 1,
    }


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def _at_recovery(then: Callable[[], None]) -> Iterator[None]:
    from moe_router_cluster.journal import Journal

    recovered = Journal.recovered

    def noted(self: Journal, recovery: Any) -> None:
        then()
        recovered(self, recovery)

    with _replaced(Journal, "recovered", noted):
        yield


@contextmanager
def _gating_killed(run: str) -> Iterator[None]:
    """Its process is killed once, after the first checkpoint."""
    import ray

    from moe_router_cluster.gating_actor import find_gating
    from moe_router_cluster.journal import Journal

    stepped = Journal.stepped
    struck: list[int] = []

    def noted(self: Journal, records: Any, seconds: float) -> None:
        stepped(self, records, seconds)
        if not struck and records[-1].step >= CHECKPOINT_EVERY:
            pid = ray.get(find_gating(run).__ray_call__.remote(lambda _: os.getpid()))
            os.kill(pid, signal.SIGKILL)
            struck.append(pid)

    with _replaced(Journal, "stepped", noted):
        yield
    assert struck


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", default="*", help="of rows, such as 'SIGKILL/*'")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--save", action="store_true")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        folder = Path(name)
        first = config_of(folder, "first", asked.ranks[0])
        prepare_environment(first.cluster)
        with ray_session(first.cluster):
            for ranks in asked.ranks:
                clean = config_of(folder, f"clean-W{ranks}", ranks)
                train_once(clean)
                for fault in faults(ranks):
                    if not fnmatch.fnmatch(fault.name, asked.only):
                        continue
                    row = measure(fault, folder, ranks, learned(clean)) | provenance("cpu")
                    print(_line(row), flush=True)
                    if asked.save:
                        save("faults", [row])


def _line(row: Row) -> str:
    parts = ""
    if "detect_s" in row:
        parts = f"detected {row['detect_s']:.2f}, resumed {row['resume_s']:.2f}"
    verdict = "equal" if row["correct"] else "WRONG"
    return f"{row['name']:<44} {row['value']:>7.2f} s  {parts:<34} {verdict}"


if __name__ == "__main__":
    main()
