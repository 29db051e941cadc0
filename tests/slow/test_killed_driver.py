"""A submitted run whose driver is killed: the job goes on, and who follows it sees its end."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from moe_router_cluster import session
from tests.cluster.conftest import make_tiny
from tests.cluster.test_submit import address, start, written  # noqa: F401
from tests.cluster.weights import tensors

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


STEPS = 100


def driver_of(run: str) -> int | None:
    """The process id of the driver that trains this run, wherever Ray has started it."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            ours = b"moe_router_cluster.cli" in words and b"train" in words
            if ours and f"name: {run}\n" in (folder / "cwd" / "config.yaml").read_text():
                return int(folder.name)
        except OSError:
            continue  # it has ended meanwhile
    return None


def test_a_killed_driver_does_not_end_the_run(address, tmp_path):  # noqa: F811
    config = make_tiny(tmp_path / "runs", name="outlives", steps=STEPS, checkpoint_every=20)
    folder = Path(config.run.dir) / config.run.name
    path = written(tmp_path / "outlives.yaml", config)
    process = start("submit", path, "--address", address, cwd=tmp_path)
    until = time.monotonic() + 120
    while not list(folder.glob("step_*/state.json")):
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.05)
    os.kill(driver_of("outlives"), signal.SIGKILL)
    out, err = process.communicate(timeout=240)
    assert (process.returncode, err) == (0, ""), out
    assert "the driver was killed (SIGKILL); it starts again" in out
    assert "going on from step " in out and "succeeded after" in out
    assert json.loads((folder / "summary.json").read_text())["steps"] == STEPS

    from rich.console import Console

    from moe_router_cluster.train import train

    clean = make_tiny(tmp_path / "runs", name="clean", steps=STEPS, checkpoint_every=20)
    with session.ray_session(clean.cluster):
        assert train(clean, Console(quiet=True))
    assert tensors(config) == tensors(clean)
