"""The folders of checkpoints: which are whole, which is newest, and making them last."""

import os
import re
import shutil
from pathlib import Path

VERSION = 1  # of state.json and the names of tensors


def step_folders(run_dir: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    if not run_dir.is_dir():
        return []
    steps = {}
    for path in run_dir.iterdir():
        if (match := re.fullmatch(r"step_(\d+)", path.name)) and (path / "state.json").is_file():
            steps[int(match[1])] = path
    return [steps[step] for step in sorted(steps)]


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The newest whole checkpoint of a run."""
    folders = step_folders(run_dir)
    return folders[-1] if folders else None


def drop_leftovers(run_dir: Path) -> None:
    """Remove what an interrupted write left behind."""
    for path in run_dir.glob("step_*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of each safetensors file."""
    return {path.name: path.stat().st_size for path in sorted(folder.glob("*.safetensors"))}


def sync_folder(folder: Path) -> None:
    """fsync every file of a folder, and the folder: after this, a power cut loses nothing."""
    for path in [*(p for p in folder.iterdir() if p.is_file()), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
