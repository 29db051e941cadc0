"""Folders of checkpoints: only whole ones count, and a crash at any moment leaves one."""

import json
import os

import pytest

from moe_router.errors import CheckpointError
from moe_router.training import checkpoint_files
from moe_router.training.checkpoint_files import (
    drop_leftovers,
    fresh_folder,
    latest_checkpoint,
    prune,
    publish,
    read_about,
    step_folders,
)

FILE = "a.safetensors"


def write(run_dir, step, content=b"1234"):
    """A checkpoint whose tensors are anything."""
    partial = run_dir / f"step_{step}.tmp"
    fresh_folder(partial)
    (partial / FILE).write_bytes(content)
    publish(partial, run_dir / f"step_{step}", {"step": step, "ranks": 1, "config": {}})
    return run_dir / f"step_{step}"


def names(run_dir):
    return sorted(path.name for path in run_dir.iterdir())


def test_steps_are_ordered_as_numbers(tmp_path):
    for step in (100, 9, 20):
        write(tmp_path, step)
    assert [path.name for path in step_folders(tmp_path)] == ["step_9", "step_20", "step_100"]
    assert latest_checkpoint(tmp_path) == tmp_path / "step_100"
    assert latest_checkpoint(tmp_path / "nowhere") is None
    assert read_about(tmp_path / "step_9") == {
        "version": 1,
        "step": 9,
        "ranks": 1,
        "config": {},
        "files": {FILE: 4},
    }


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: (path / FILE).unlink(),
        lambda path: os.truncate(path / FILE, 3),
        lambda path: (path / FILE).write_bytes(b"12345"),
        lambda path: (path / "other.safetensors").touch(),
        lambda path: (path / "state.json").unlink(),
        lambda path: (path / "state.json").write_text('{"version": 1}'),
        lambda path: (path / "state.json").write_text("{"),
    ],
)
def test_a_damaged_one_is_passed_over_for_an_older_one(tmp_path, damage):
    older, newer = write(tmp_path, 1), write(tmp_path, 2)
    damage(newer)
    assert latest_checkpoint(tmp_path) == older
    with pytest.raises(CheckpointError) as refused:
        read_about(newer)
    assert str(refused.value).startswith(str(newer)) and "\n" not in str(refused.value)


def test_one_of_a_newer_program_is_not_passed_over(tmp_path):
    """A run must not go on from an older step, or start anew, over what it cannot read."""
    write(tmp_path, 1)
    newer = write(tmp_path, 2)
    (newer / "state.json").write_text(json.dumps({"version": 2}))
    assert latest_checkpoint(tmp_path) == newer
    with pytest.raises(CheckpointError, match="version 2, want 1: use a newer moe_router"):
        read_about(newer)


def test_the_same_step_again_takes_the_place_of_the_first(tmp_path):
    write(tmp_path, 3, b"first")
    write(tmp_path, 3, b"again")
    assert names(tmp_path) == ["step_3"]
    assert (tmp_path / "step_3" / FILE).read_bytes() == b"again"


@pytest.mark.parametrize("moment", range(1, 3))
def test_a_crash_between_two_renames_loses_no_older_step(tmp_path, monkeypatch, moment):
    write(tmp_path, 2)
    write(tmp_path, 3, b"first")
    calls, real = [], os.rename

    def rename(source, target):
        calls.append(source)
        if len(calls) == moment:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(checkpoint_files.os, "rename", rename)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, 3, b"again")
    assert latest_checkpoint(tmp_path).name in ("step_2", "step_3")
    drop_leftovers(tmp_path)
    assert set(names(tmp_path)) <= {"step_2", "step_3"}


def test_only_the_newest_are_kept_and_strangers_stay(tmp_path):
    for step in range(1, 5):
        write(tmp_path, step)
    (tmp_path / "step_x").mkdir()
    (tmp_path / "config.yaml").touch()
    prune(tmp_path, 2)
    assert names(tmp_path) == ["config.yaml", "step_3", "step_4", "step_x"]


def test_a_prune_that_is_cut_off_leaves_no_half_checkpoint(tmp_path, monkeypatch):
    for step in (1, 2):
        write(tmp_path, step)

    def refuse(path):
        raise OSError("busy")

    monkeypatch.setattr(checkpoint_files.shutil, "rmtree", refuse)
    prune(tmp_path, 1)
    assert [path.name for path in step_folders(tmp_path)] == ["step_2"]
    monkeypatch.undo()
    drop_leftovers(tmp_path)
    assert names(tmp_path) == ["step_2"]
