"""The folders of checkpoints: which are whole, which is newest, how one gets its name.

A folder is written as step_N.tmp and renamed to step_N when all of it is on the disk, so a folder
named step_N is whole unless something damaged it later: state.json holds the size of every file.
"""

import json
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from moe_router.errors import CheckpointError

VERSION = 1  # of state.json and the names of tensors
STATE = "state.json"


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The newest whole checkpoint of a run; damaged ones are passed over."""
    folders = step_folders(run_dir)
    return folders[-1] if folders else None


def step_folders(run_dir: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    if not run_dir.is_dir():
        return []
    steps = {}
    for path in run_dir.iterdir():
        if (match := re.fullmatch(r"step_(\d+)", path.name)) and _is_whole(path):
            steps[int(match[1])] = path
    return [steps[step] for step in sorted(steps)]


def read_about(step_dir: Path) -> dict[str, Any]:
    """state.json, checked against the files that lie beside it.

    Returns:
        step, ranks (that wrote it), config (as `config_to_dict` gives it), files (name to bytes).

    Raises:
        CheckpointError: not a checkpoint, of another version, or damaged.
    """
    about = _parse(step_dir)
    if about["version"] != VERSION:
        raise CheckpointError(
            f"{step_dir / STATE}: version {about['version']}, want {VERSION}: use a newer "
            "moe_router"
        )
    damage = _damage(step_dir, about["files"])
    if damage is not None:
        raise CheckpointError(f"{damage}; go on from another step_N folder of the run")
    return about


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of each safetensors file."""
    return {path.name: path.stat().st_size for path in sorted(folder.glob("*.safetensors"))}


def state_text(about: dict[str, Any], files: dict[str, int]) -> str:
    """What state.json says.

    Args:
        about: step, ranks, config; see `read_about`.
        files: name to bytes.
    """
    return json.dumps({"version": VERSION, **about, "files": files}, indent=1)


def fresh_folder(path: Path) -> None:
    """An empty folder in the place of whatever an earlier try left there."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)


def publish(partial: Path, final: Path, about: dict[str, Any]) -> None:
    """Describe the files in `partial`, make all of it last, and give it its name.

    Raises:
        OSError: the disk refused; what was at `final` is still there.
    """
    (partial / STATE).write_text(state_text(about, sizes(partial)))
    _sync(partial / STATE)
    _sync(partial)
    aside = None
    if final.exists():  # the same step, replayed after a loss
        aside = final.with_name(f"{final.name}.old.tmp")
        fresh_folder(aside)
        aside.rmdir()
        os.rename(final, aside)
    os.rename(partial, final)
    _sync(final.parent)
    if aside is not None:
        shutil.rmtree(aside, ignore_errors=True)


def prune(run_dir: Path, keep: int) -> None:
    """Delete all whole checkpoints but the newest `keep`."""
    for old in step_folders(run_dir)[:-keep]:
        doomed = old.with_name(f"{old.name}.tmp")
        with suppress(OSError):  # costs space, not a checkpoint; the next one tries again
            os.rename(old, doomed)  # at once: half a checkpoint never has a checkpoint's name
            shutil.rmtree(doomed)


def drop_leftovers(run_dir: Path) -> None:
    """Remove what an interrupted write left behind. Only for the one who writes this run."""
    for path in run_dir.glob("step_*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def _is_whole(step_dir: Path) -> bool:
    """A version we cannot read counts: to restore from it says so, to start anew would hide it."""
    try:
        about = _parse(step_dir)
    except CheckpointError:
        return False
    return about["version"] != VERSION or _damage(step_dir, about["files"]) is None


def _parse(step_dir: Path) -> dict[str, Any]:
    path = step_dir / STATE
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{step_dir}: no {STATE}, so this is no checkpoint of moe_router; want runs/NAME/step_N"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); check it") from error
    except ValueError:
        raise CheckpointError(
            f"{path}: not a {STATE} of moe_router (no JSON); go on from another step_N folder"
        ) from None
    version = about.get("version") if isinstance(about, dict) else None
    ours = isinstance(version, int)
    if version == VERSION:
        keys = {"step": int, "ranks": int, "config": dict, "files": dict}
        ours = all(isinstance(about.get(key), kind) for key, kind in keys.items())
    if not ours:
        raise CheckpointError(
            f"{path}: not a {STATE} of moe_router; want runs/NAME/step_N, written by train"
        )
    checked: dict[str, Any] = about
    return checked


def _damage(step_dir: Path, files: dict[str, int]) -> str | None:
    """What differs from when it was written, None if nothing."""
    have = sizes(step_dir)
    for name, size in files.items():
        if have.get(name) != size:
            got = have.get(name, "no")
            return f"{step_dir / name}: {got} bytes, want {size}: the checkpoint is truncated"
    foreign = sorted(have.keys() - files.keys())
    return f"{step_dir / foreign[0]}: not a part of the checkpoint" if foreign else None


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
