"""A driver that is killed starts again; one that ends by itself, or is stopped, does not."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moe_router_cluster import keep

ROOT = Path(__file__).resolve().parents[2] / "cluster"
# notes its arguments, then does what the line of `plan` with its number says
DRIVER = """
import os, sys, time
from pathlib import Path
runs = Path("runs.txt")
done = runs.read_text().splitlines() if runs.exists() else []
runs.write_text("\\n".join([*done, " ".join(sys.argv[1:])]))
for word in Path("plan.txt").read_text().split("\\n")[len(done)].split():
    if word == "wait":
        time.sleep(60)
    elif word.startswith("exit"):
        sys.exit(int(word[4:]))
    else:
        os.kill(os.getpid(), int(word))
"""
KEEP = """
import sys
from moe_router_cluster import keep
keep._PAUSE_S = 0.0
sys.exit(keep.Keeper([sys.executable, "driver.py", *sys.argv[1:]]).run())
"""


@pytest.fixture
def start(tmp_path):
    def started(*plan: str) -> subprocess.Popen:
        (tmp_path / "driver.py").write_text(DRIVER)
        (tmp_path / "plan.txt").write_text("\n".join(plan))
        return subprocess.Popen(
            [sys.executable, "-c", KEEP, "train", "config.yaml", "--restart"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    return started


def runs(tmp_path) -> list[str]:
    path = tmp_path / "runs.txt"
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize("code", [0, 1, 130])
def test_a_driver_that_ends_by_itself_has_ended_the_run(start, tmp_path, code):
    process = start(f"exit{code}")
    assert process.communicate(timeout=60)[0] == ""
    assert process.returncode == code and len(runs(tmp_path)) == 1


def test_a_killed_one_goes_on_and_moves_nothing_aside(start, tmp_path):
    process = start("9", "15", "exit0")
    said = process.communicate(timeout=60)[0].splitlines()
    assert process.returncode == 0
    assert said == [
        "the driver was killed (SIGKILL); it starts again",
        "the driver was killed (SIGTERM); it starts again",
    ]
    assert runs(tmp_path) == ["train config.yaml --restart", *["train config.yaml"] * 2]


def test_one_that_is_killed_at_once_every_time_is_given_up(start, tmp_path):
    process = start(*["9"] * 10)
    process.communicate(timeout=60)
    assert process.returncode == 128 + 9 and len(runs(tmp_path)) == keep._MOST


def test_a_stopped_job_does_not_begin_again(start, tmp_path):
    process = start("wait", "exit0")
    until = time.monotonic() + 30
    while not runs(tmp_path):
        assert time.monotonic() < until
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)  # as Ray does: every process of the job
    process.communicate(timeout=60)
    assert process.returncode == 128 + 15 and len(runs(tmp_path)) == 1
