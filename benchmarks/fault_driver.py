"""A training whose driver is killed once, kept alive as a submitted one is.

python -m benchmarks.fault_driver CONFIG.yaml    # one driver
"""

import json
import os
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from benchmarks.fault_cases import STEP
from benchmarks.results import Row
from moe_router.config import Config
from moe_router.config_file import config_to_dict, load_config

_MOST_S = 300.0
_KEEP = (
    "import sys; from moe_router_cluster.keep import Keeper; sys.exit(Keeper(sys.argv[1:]).run())"
)


def drive(config: Config) -> Row:
    """The run in processes of its own; time from the strike until the next driver's ranks stood."""
    run_dir = Path(config.run.dir) / config.run.name
    path = run_dir.with_name(f"{run_dir.name}.yaml")
    path.write_text(yaml.safe_dump(config_to_dict(config)))
    driver = [sys.executable, "-m", "benchmarks.fault_driver", str(path)]
    done = subprocess.run(
        [sys.executable, "-c", _KEEP, *driver], capture_output=True, text=True, timeout=_MOST_S
    )
    assert done.returncode == 0, done.stdout + done.stderr
    log = (run_dir / "logs" / "run.jsonl").read_text().splitlines()
    starts = [line for line in map(json.loads, log) if line["event"] == "started"]
    assert len(starts) == 2, starts
    struck = float(_mark(run_dir).read_text())
    seconds = round(datetime.fromisoformat(starts[1]["time"]).timestamp() - struck, 2)
    return {"value": seconds, "from_step": starts[1]["step"], "correct": starts[1]["step"] > 0}


def _mark(run_dir: Path) -> Path:
    return run_dir.with_name(f"{run_dir.name}.struck")


def main(path: str) -> None:
    from rich.console import Console

    from moe_router_cluster.journal import Journal
    from moe_router_cluster.train import train

    config = load_config(path)
    mark = _mark(Path(config.run.dir) / config.run.name)
    stepped = Journal.stepped

    def noted(self: Journal, records: Any, seconds: float) -> None:
        stepped(self, records, seconds)
        if records[-1].step >= STEP and not mark.exists():
            mark.write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)

    Journal.stepped = noted  # type: ignore[method-assign]
    train(config, Console())


if __name__ == "__main__":
    main(sys.argv[1])
