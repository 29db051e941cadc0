"""The command as a user types it: exit codes, one-line errors, no process left."""

import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
import yaml

from moe_router.config_file import config_to_dict

pytestmark = pytest.mark.timeout(180)
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def command(tiny, tmp_path):
    """Start `moe-router train` on a tiny config; (process, mark of all its processes)."""
    started = []

    def start(*options, **config):
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump(config_to_dict(tiny(**config))))
        mark = uuid.uuid4().hex
        roots = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "cluster")]
        process = subprocess.Popen(
            [sys.executable, "-m", "moe_router_cluster.cli", "train", str(path), *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            start_new_session=True,  # Ctrl-C reaches every process of a terminal's group
            env={**os.environ, "PYTHONPATH": os.pathsep.join(roots), "MARK": mark},
        )
        started.append(process)
        return process, mark

    yield start
    for process in started:
        process.kill()
        process.communicate()


def marked(mark: str) -> list[str]:
    """Command lines of the processes that a marked command left running."""
    left = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (place / "environ").read_bytes():
                left.append((place / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:  # it ended, or is somebody else's
            continue
    return left


def wait_for(process, text: str) -> None:
    for line in process.stdout:
        if text in line:
            return
    pytest.fail(f"{text!r} was never printed; stderr: {process.stderr.read()}")


def test_ctrl_c_ends_cleanly_with_a_checkpoint(command, tmp_path):
    process, mark = command(steps=100_000, checkpoint_every=50_000)
    wait_for(process, "step 1/100000")
    assert len(marked(mark)) > 3
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "stopped: " in out and "the same command goes on" in out
    assert err == ""
    assert len(list((tmp_path / "runs" / "tiny").glob("step_*/state.json"))) == 1
    assert marked(mark) == []


def test_a_second_ctrl_c_does_not_wait(command, tmp_path):
    process, mark = command(steps=100_000, checkpoint_every=50_000)
    wait_for(process, "starting")  # nothing to save yet: the first is as good as a second
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines() == ["interrupted; the same command goes on from the newest checkpoint"]
    assert marked(mark) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "train.stepz=3"], "stepz"),
        (["--kill", "7@0.5"], "--kill 7@0.5: rank 7, want 0..1 (cluster.actors)"),
        pytest.param(
            ["--set", "train.lr=1e30", "--set", "train.clip_norm=0"], "step", marks=pytest.mark.slow
        ),
    ],
)
def test_an_error_is_one_line_and_exit_code_1(command, options, message):
    process, mark = command(*options)
    _, err = process.communicate(timeout=90)
    assert process.returncode == 1
    (line,) = err.splitlines()
    assert line.startswith("error: ") and message in line
    assert marked(mark) == []
