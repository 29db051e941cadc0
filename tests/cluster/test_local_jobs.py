"""Trainings in the background of this machine, as a user types the commands."""

import os
import re
import signal
import time
import uuid
from dataclasses import replace
from pathlib import Path

import pytest

from moe_router.errors import ClusterError, ConfigError
from moe_router_cluster.local_jobs import LocalJobs
from tests.cluster.test_cli import marked
from tests.cluster.test_submit import command, finish, start, written

pytestmark = pytest.mark.timeout(180)


def until(true, seconds=90.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def drivers(id: str) -> list[int]:
    """Process ids of those that train a job, but for its keeper."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue  # it has ended meanwhile
        ours = any(word.endswith(f"/{id}/config.yaml".encode()) for word in words)
        if ours and b"moe_router_cluster.cli" in words:
            found.append(int(folder.name))
    return found


def test_a_killed_driver_does_not_end_the_run_and_stop_saves_a_checkpoint(tiny, tmp_path):
    run = tmp_path / "runs" / "long"
    path = written(tmp_path / "long.yaml", tiny(name="long", steps=100_000, checkpoint_every=5))
    mine = {"XDG_STATE_HOME": str(tmp_path / "state"), "MARK": uuid.uuid4().hex}
    code, out, err = command("train", path, "--detach", cwd=tmp_path, **mine)
    assert (code, err) == (0, "")
    id = re.fullmatch(r"(long-\w{6}) trains in .*; look: moe-router jobs \1\n", out)[1]
    until(lambda: list(run.glob("step_*/state.json")))
    [driver] = drivers(id)
    os.kill(driver, signal.SIGKILL)

    looking, listing = (start("jobs", *what, cwd=tmp_path, **mine) for what in ((id,), ()))
    said = []
    while not said or "going on from step " not in said[-1]:
        said.append(looking.stdout.readline())
        assert said[-1], (said, looking.stderr.read())
    assert "the driver was killed (SIGKILL); it starts again\n" in said
    code, out, err = finish(listing)
    assert (code, err) == (0, "") and re.search(rf"{id}\W+long\W+running", out), out
    assert command("jobs", "--stop", id, cwd=tmp_path, **mine) == (
        0,
        f"{id} saves a checkpoint and ends\n",
        "",
    )
    code, out, err = finish(looking)
    assert (code, err) == (130, "")
    last = int(re.search(r"stopped: \S+/step_(\d+) is written; the same command", out)[1])
    assert (run / f"step_{last}" / "state.json").is_file()
    assert re.search(rf"{id} was stopped after ", out)
    until(lambda: marked(mine["MARK"]) == [])  # nor anything of the driver that was killed


@pytest.fixture
def jobs(tmp_path):
    return LocalJobs(tmp_path / "jobs")


def test_how_a_job_ended_is_known_however_it_ended(jobs, tiny):
    config = tiny(name="a bad one")
    bad = jobs.submit(replace(config, data=replace(config.data, source="text", path="/nowhere")))
    killed = jobs.submit(config)
    os.killpg(jobs._facts(killed)["group"], signal.SIGKILL)
    until(lambda: jobs.get(killed).over and jobs.get(bad).over)
    assert [(job.run, job.state) for job in jobs.all()] == [("a bad one", "FAILED")] * 2
    assert jobs.get(bad).message == "it ended with exit code 1"
    assert jobs.get(killed).message.startswith("nobody keeps it any more (a restart of the mach")
    assert not jobs.stop(bad) and not jobs.stop(killed)


def test_what_cannot_be_is_said_at_once(jobs, tiny):
    with pytest.raises(ConfigError, match=r"--kill 7@0\.5: rank 7"):
        jobs.submit(tiny(), kill="7@0.5")
    for id in ("nope-1", "../jobs"):
        with pytest.raises(ClusterError, match=f"{id}: no such job on this machine; `moe-router j"):
            jobs.get(id)
    assert jobs.all() == []
