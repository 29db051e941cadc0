"""What a fault at each point of the protocol costs, and that it leaves no trace in the weights.

    python -m benchmarks.faults [--only PATTERN] [--ranks 2] [--device cuda] [--seconds S] [--save]
    python -m benchmarks.faults --save --resume     # without the rows that this commit has saved

Each row is a whole run over Ray, and gloo (`--device cuda`: NCCL, a GPU a rank), in which a rank
kills (SIGKILL) or freezes (SIGSTOP) itself, its node or the driver, once, in the middle of the run.
`correct`: every tensor of the last checkpoint, optimizer included, and every loss equal, bit for
bit, those of an uninterrupted run of the same ranks. The value is the time from the fault until all
ranks stood at a common step: detected, and then resumed.
"""

import argparse
import fnmatch
import io
import json
import math
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from safetensors import safe_open

from benchmarks.fault_cases import (
    CHECKPOINT_EVERY,
    STEP,
    STEPS,
    Fault,
    clean_name,
    config_of,
    faults,
)
from benchmarks.results import Row, provenance, save, saved
from moe_router.config import Config
from moe_router.observability.csv_log import read_rows
from moe_router_cluster.session import prepare_environment, ray_session

OWN_RAY = ("driver", "node")  # victims that take their Ray with them
Learned = tuple[dict[str, bytes], list[tuple[str, str]]]


def learned(config: Config, step: int = STEPS) -> Learned:
    """Every tensor of the last checkpoint, byte for byte, and every loss."""
    folder = Path(config.run.dir) / config.run.name
    found: dict[str, bytes] = {}
    for path in sorted((folder / f"step_{step}").glob("*.safetensors")):
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

    with replaced(shard_group, "ExpertShardActor", FaultyShardActor):
        yield


def clean_run(fault: Fault, folder: Path, ranks: int, device: str = "cpu") -> Learned:
    """What a run without the fault learns; trained once."""
    alike = replace(fault, how=signal.SIGKILL)
    config = config_of(folder, clean_name(fault, ranks), ranks, alike, device)
    if not (folder / config.run.name / "summary.json").exists():
        train_once(config)
    return learned(config)


def measure(fault: Fault, folder: Path, ranks: int, clean: Learned, device: str = "cpu") -> Row:
    """A run with the fault in it."""
    name = fault.name.replace("/", "-").replace(" ", "_")
    config = config_of(folder, name, ranks, fault, device)
    row: Row = {"name": fault.name, "unit": "s", "ranks": ranks}
    match fault.victim:
        case "gating service":  # nobody waits for it: there is nothing to recover from
            with gating_killed(config.run.name):
                facts = train_once(config)
            row |= {"value": 0.0, "correct": facts["recoveries"] == 0}
        case "driver":
            from benchmarks.fault_driver import drive

            row |= drive(config)
        case "node":
            from benchmarks.fault_node import nodes

            with nodes(ranks, config) as there:
                row |= _struck(there, fault)
        case "ranks":
            row |= _struck(config, fault)
    return row | {"correct": row["correct"] and learned(config) == clean}


def _struck(config: Config, fault: Fault) -> Row:
    """A run in which ranks strike."""
    from benchmarks.fault_shard import order, struck_at

    run_dir = Path(config.run.dir) / config.run.name
    ended: list[float] = []
    with faulty_ranks(), _at_recovery(lambda: ended.append(time.time())):
        order(run_dir, (fault, STEP))
        facts = train_once(config)
    struck = struck_at(run_dir)
    assert struck is not None, f"{fault.name}: never came to {fault.point}"
    from_step = facts["recovery_log"][-1]["from_step"]
    total = ended[-1] - struck
    resume = sum(each["seconds"] for each in facts["recovery_log"])
    return {
        "value": round(total, 2),
        "detect_s": round(total - resume, 2),
        "resume_s": round(resume, 2),
        "from_step": from_step,
        "recoveries": facts["recoveries"],
        # back with the replica, where there are any
        "correct": not fault.replicate_every or from_step > CHECKPOINT_EVERY,
    }


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
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

    with replaced(Journal, "recovered", noted):
        yield


@contextmanager
def gating_killed(run: str) -> Iterator[None]:
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

    with replaced(Journal, "stepped", noted):
        yield
    assert struck


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", default="*", help="of rows, such as 'SIGKILL/*'")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--seconds", type=float, default=math.inf, help="no row begins after them")
    parser.add_argument("--resume", action="store_true", help="leave out what this commit saved")
    parser.add_argument("--save", action="store_true")
    asked = parser.parse_args(arguments)
    until = time.monotonic() + asked.seconds
    origin = provenance(asked.device)
    there = saved("faults", origin) if asked.resume else set()
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        folder = Path(name)
        for ranks in asked.ranks:
            chosen = [
                fault
                for fault in faults(ranks)
                if fnmatch.fnmatch(fault.name, asked.only)
                and fault.name not in there
                # whose nodes have no GPUs
                and (asked.device == "cpu" or fault.victim != "node")
            ]
            here = [fault for fault in chosen if fault.victim not in OWN_RAY]
            cluster = config_of(folder, "first", ranks).cluster
            prepare_environment(cluster)
            with ray_session(cluster) if here else nullcontext():
                _rows(here, folder, ranks, origin, until, asked)
            own = [fault for fault in chosen if fault.victim in OWN_RAY]
            _rows(own, folder, ranks, origin, until, asked)


def _rows(
    chosen: list[Fault],
    folder: Path,
    ranks: int,
    origin: Row,
    until: float,
    asked: argparse.Namespace,
) -> None:
    for fault in chosen:
        if time.monotonic() > until:
            print(f"{fault.name}: no time left; --resume goes on", flush=True)
            return
        clean = clean_run(fault, folder, ranks, asked.device)
        row = measure(fault, folder, ranks, clean, asked.device) | origin
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
