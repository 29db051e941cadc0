"""Many kills in one run: a rank dies again and again, and nothing is left of the dead.

    python -m benchmarks.kills [--cycles 100] [--seconds 480] [--save]

A run on two ranks in which they take turns to SIGKILL themselves in the middle of a step, once for
each cycle. After `--seconds` it stops, and the same command goes on with it. Counted after each
resume: processes below this one, their threads' descriptors and sockets as far as they live through
all cycles (this process and Ray's own), and what lies in shared memory. `correct`: none of it grew
from the tenth resume of a command to its last, nothing is left when Ray has ended, and the weights
are bit for bit those of an uninterrupted run.
"""

import argparse
import json
import os
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from rich.console import Console

from benchmarks import faults
from benchmarks.fault_cases import CHECKPOINT_EVERY, Fault, config_of
from benchmarks.results import Row, provenance, save
from moe_router.config import Config
from moe_router_cluster.session import prepare_environment, ray_session

RANKS = 2
SETTLED = 10  # resumes after which pools are full
SPARE_FDS = 8  # gRPC opens and closes channels of its own
_GONE_S = 30.0  # for the last process to end


@dataclass(frozen=True, slots=True)
class Count:
    """What there is at one moment.

    Attributes:
        descriptors, sockets: of this process and those of Ray that stay.
        shared: names in /dev/shm, but for those that processes of others on this machine use.
    """

    processes: int
    descriptors: int
    sockets: int
    shared: frozenset[str]

    @classmethod
    def now(cls) -> "Count":
        me = psutil.Process()
        below = me.children(recursive=True)
        stay = [me, *(p for p in me.children() if p.name() in ("raylet", "gcs_server"))]
        links = [_links(process.pid) for process in stay]
        return cls(
            len(below),
            sum(map(len, links)),
            sum(link.startswith("socket:") for of in links for link in of),
            frozenset(os.listdir("/dev/shm")) - _mapped({me.pid, *(p.pid for p in below)}),
        )


def _links(pid: int) -> list[str]:
    """What each open descriptor of a process is."""
    found = []
    for each in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found.append(os.readlink(each))
        except FileNotFoundError:
            continue  # closed meanwhile, as is the one that lists them
    return found


def _mapped(ours: set[int]) -> set[str]:
    """Names in /dev/shm that some process has mapped which is none of ours."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        if int(folder.name) in ours:
            continue
        try:
            lines = (folder / "maps").read_text().splitlines()
        except OSError:
            continue  # it has ended meanwhile
        found |= {Path(line.split()[5]).name for line in lines if " /dev/shm/" in line}
    return found


def config_with(cycles: int, folder: Path, name: str) -> Config:
    """A run that is long enough for so many losses."""
    config = config_of(folder, name, RANKS)
    steps = cycles + 2 * CHECKPOINT_EVERY
    return replace(
        config,
        train=replace(config.train, steps=steps),
        cluster=replace(config.cluster, max_recoveries=2 * cycles),
    )


def measure(cycles: int, seconds: float, folder: Path) -> Row | None:
    """The row of one long run; None if it is not at its end, and the same call goes on."""
    from benchmarks.fault_shard import order

    before = Count.now()
    clean, config = (config_with(cycles, folder, name) for name in ("clean", "killed"))
    with ray_session(config.cluster):
        if not (folder / clean.run.name / "summary.json").exists():
            faults.train_once(clean)
            order(folder / config.run.name, *(_fault(number) for number in range(cycles)))
        with faults.faulty_ranks(), _counted(seconds) as counts:
            ended = _train(config)
    pieces = _noted(folder / "pieces.json", _grown(counts) | {"left": _left(before)})
    if not ended:
        return None
    log = (folder / config.run.name / "logs" / "run.jsonl").read_text().splitlines()
    resumes = [line["seconds"] for line in map(json.loads, log) if line["event"] == "recovered"]
    same = faults.learned(config, config.train.steps) == faults.learned(clean, clean.train.steps)
    grown = {name: max(piece[name] for piece in pieces) for name in _grown([])}
    left = [name for piece in pieces for name in piece["left"]]
    within = max(grown.values()) <= SPARE_FDS
    within = within and grown["processes_grown"] <= 0 and grown["shared_grown"] <= 0
    return {
        "name": f"kills in a row/W{RANKS}", "value": len(resumes), "unit": "cycles",
        "resume_s": round(median(resumes), 2), "longest_s": round(max(resumes), 2),
        "commands": len(pieces), "equal": same, "left": left, **grown,
        "correct": same and within and not left,
    }  # fmt: skip


def _train(config: Config) -> bool:
    """False if it was stopped."""
    from moe_router_cluster.train import train

    return train(config, Console(quiet=True))


def _grown(counts: list[Count]) -> dict[str, int]:
    """From when pools were full until the last resume."""
    names = ("processes", "descriptors", "sockets", "shared")
    if not counts:
        return {f"{name}_grown": 0 for name in names}
    settled, last = counts[min(SETTLED, len(counts)) - 1], counts[-1]
    return {
        "processes_grown": last.processes - settled.processes,
        "descriptors_grown": last.descriptors - settled.descriptors,
        "sockets_grown": last.sockets - settled.sockets,
        "shared_grown": len(last.shared) - len(settled.shared),
    }


def _noted(path: Path, piece: dict[str, Any]) -> list[dict[str, Any]]:
    """Of all commands that worked on this run, this one the last."""
    before = json.loads(path.read_text()) if path.exists() else []
    path.write_text(json.dumps([*before, piece]))
    return [*before, piece]


def _fault(number: int) -> tuple[Fault, int]:
    ranks = (number % RANKS,)
    return Fault(f"kill {number}", "before combine", signal.SIGKILL, ranks), number + 1


@contextmanager
def _counted(seconds: float) -> Iterator[list[Count]]:
    """Counts after each resume; when the time is over, the run is stopped as by Ctrl-C."""
    from moe_router_cluster.journal import Journal

    counts: list[Count] = []
    recovered, until = Journal.recovered, time.monotonic() + seconds

    def noted(self: Journal, recovery: Any) -> None:
        recovered(self, recovery)
        counts.append(Count.now())
        if time.monotonic() > until:
            os.kill(os.getpid(), signal.SIGINT)

    with faults.replaced(Journal, "recovered", noted):
        yield counts


def _left(before: Count) -> list[str]:
    """What is there that was not there before, once the last process had time to end."""
    until = time.monotonic() + _GONE_S
    while (now := Count.now()).processes > before.processes and time.monotonic() < until:
        time.sleep(0.5)
    processes = [p.name() for p in psutil.Process().children(recursive=True)]
    return processes[before.processes :] + sorted(now.shared - before.shared)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cycles", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=480, help="then it stops")
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="of its run")
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args(arguments)
    folder = args.folder.absolute() / f"kills-{args.cycles}"
    folder.mkdir(parents=True, exist_ok=True)
    prepare_environment(config_of(folder, "first", RANKS).cluster)
    row = measure(args.cycles, args.seconds, folder)
    if row is None:
        print("the time is over; the same command goes on", flush=True)
        return
    print(row | provenance("cpu"), flush=True)
    if args.save:
        save("faults", [row | provenance("cpu")])
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
