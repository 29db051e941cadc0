"""Where checkpoints of a run are kept: a folder that all ranks see, or an object store.

Every rank writes its file into a local folder first. A folder is then renamed when it is whole; an
object store has no rename, so there state.json comes last, and a step without one is none.
"""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from moe_router.config import Config
from moe_router.errors import CheckpointError
from moe_router.training.checkpoint_files import (
    STATE,
    fresh_folder,
    latest_checkpoint,
    prune,
    publish,
    state_text,
)
from moe_router.training.remote import explained, is_remote, open_remote


class Store(Protocol):
    def latest(self) -> str | None:
        """The newest whole checkpoint: what `local` takes; None if there is none."""
        ...

    def local(self, step: str) -> AbstractContextManager[Path]:
        """The local folder to read `step` from, until it ends.

        Raises:
            CheckpointError: there is no such checkpoint, or the store refuses it.
        """
        ...

    def bring(self, step: str, run_dir: Path) -> Path:
        """A checkpoint into the run's own folder, where eval, generate and serve look for it."""
        ...

    def where(self, step: int) -> str: ...

    def begin(self, step: int) -> None:
        """On each rank, before anything is written: what an earlier try left goes."""
        ...

    def partial(self, step: int) -> Path:
        """The local folder that this rank writes into."""
        ...

    def sent(self, step: int) -> None:
        """On each rank, when its file is in `partial`."""
        ...

    def publish(self, step: int, about: dict[str, Any]) -> None:
        """On rank 0, when all have sent: from now on it is a checkpoint."""
        ...

    def prune(self, keep: int) -> None:
        """Delete all checkpoints but the newest `keep`, where that can be done."""
        ...

    def discard(self, step: int) -> None:
        """On each rank: a write has failed on some rank."""
        ...


def open_store(config: Config, run_dir: Path, rank: int = 0) -> Store:
    """Where `run.storage` says; in the run's own folder without it.

    Raises:
        ConfigError: a store that nobody knows, or whose package is not installed.
    """
    storage = config.run.storage
    if storage is None:
        return FolderStore(run_dir, rank)
    if not is_remote(storage):
        return FolderStore(Path(storage) / config.run.name, rank)
    return ObjectStore(f"{storage.rstrip('/')}/{config.run.name}", run_dir, rank)


class FolderStore:
    """A folder that every rank sees: one disk, or NFS."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder = folder
        self._first = rank == 0

    def latest(self) -> str | None:
        found = latest_checkpoint(self.folder)
        return None if found is None else str(found)

    @contextmanager
    def local(self, step: str) -> Iterator[Path]:
        yield Path(step)

    def bring(self, step: str, run_dir: Path) -> Path:
        found, target = Path(step), run_dir / Path(step).name
        if found.parent != run_dir and not target.exists():
            partial = target.with_name(f"{target.name}.tmp")
            shutil.copytree(found, partial, dirs_exist_ok=True)
            partial.rename(target)
        return target

    def where(self, step: int) -> str:
        return str(self.folder / f"step_{step}")

    def begin(self, step: int) -> None:
        if self._first:
            fresh_folder(self.partial(step))

    def partial(self, step: int) -> Path:
        return self.folder / f"step_{step}.tmp"

    def sent(self, step: int) -> None:
        """It is where it must be."""

    def publish(self, step: int, about: dict[str, Any]) -> None:
        publish(self.partial(step), self.folder / f"step_{step}", about)

    def prune(self, keep: int) -> None:
        prune(self.folder, keep)

    def discard(self, step: int) -> None:
        if self._first:
            shutil.rmtree(self.partial(step), ignore_errors=True)


class ObjectStore:
    """Args:
    url: of the run, such as s3://bucket/runs/NAME.
    scratch: a local folder; ranks of one machine may share it.
    """

    def __init__(self, url: str, scratch: Path, rank: int) -> None:
        self.url = url
        self._scratch, self._rank = scratch, rank
        self._filesystem, self._path = open_remote(url, "run.storage")

    def latest(self) -> str | None:
        with explained(self.url, CheckpointError):
            whole = self._whole()
        return self.where(whole[-1]) if whole else None

    @contextmanager
    def local(self, step: str) -> Iterator[Path]:
        folder = self._scratch / f"fetched.rank_{self._rank}.tmp"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            yield self.bring(step, folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def bring(self, step: str, run_dir: Path) -> Path:
        target = run_dir / step.rsplit("/", 1)[-1]
        partial = target.with_name(f"{target.name}.tmp")
        fresh_folder(partial)
        path = f"{self._path}/{target.name}"
        with explained(step, CheckpointError):
            about = json.loads(self._filesystem.cat_file(f"{path}/{STATE}"))
            for name in [*about["files"], STATE]:
                self._filesystem.get_file(f"{path}/{name}", str(partial / name))
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        return target

    def where(self, step: int) -> str:
        return f"{self.url}/step_{step}"

    def begin(self, step: int) -> None:
        fresh_folder(self.partial(step))
        if self._rank == 0:
            with explained(self.where(step), CheckpointError):
                self._remove(step)

    def partial(self, step: int) -> Path:
        return self._scratch / f"step_{step}.rank_{self._rank}.tmp"

    def sent(self, step: int) -> None:
        folder = self.partial(step)
        with explained(self.where(step), CheckpointError):
            for file in sorted(folder.iterdir()):
                self._filesystem.put_file(str(file), f"{self._path}/step_{step}/{file.name}")
        shutil.rmtree(folder, ignore_errors=True)

    def publish(self, step: int, about: dict[str, Any]) -> None:
        with explained(self.where(step), CheckpointError):
            text = state_text(about, self._sizes(f"{self._path}/step_{step}"))
            # one request: a reader sees all of it or nothing
            self._filesystem.pipe_file(f"{self._path}/step_{step}/{STATE}", text.encode())

    def prune(self, keep: int) -> None:
        # what stays costs space, not a checkpoint; the next one tries again
        with suppress(CheckpointError), explained(self.url, CheckpointError):
            for old in self._whole()[:-keep]:
                self._remove(old)

    def discard(self, step: int) -> None:
        shutil.rmtree(self.partial(step), ignore_errors=True)
        if self._rank == 0:
            # what stays is no checkpoint: it has no state.json
            with suppress(CheckpointError), explained(self.url, CheckpointError):
                self._remove(step)

    def _whole(self) -> list[int]:
        """Steps whose files are all there with their sizes, the oldest first."""
        if not self._filesystem.exists(self._path):
            return []
        self._filesystem.invalidate_cache()
        paths = self._filesystem.ls(self._path, detail=False)
        names = [path.rstrip("/").rsplit("/", 1)[-1] for path in paths]
        steps = sorted(int(m[1]) for name in names if (m := re.fullmatch(r"step_(\d+)", name)))
        return [step for step in steps if self._is_whole(f"{self._path}/step_{step}")]

    def _is_whole(self, path: str) -> bool:
        try:
            about = json.loads(self._filesystem.cat_file(f"{path}/{STATE}"))
        except FileNotFoundError:
            return False
        files: dict[str, int] = about["files"]
        return files == self._sizes(path)

    def _sizes(self, path: str) -> dict[str, int]:
        self._filesystem.invalidate_cache()
        found = self._filesystem.ls(path, detail=True)
        sizes = {each["name"].rsplit("/", 1)[-1]: int(each["size"]) for each in found}
        return {name: size for name, size in sizes.items() if name.endswith(".safetensors")}

    def _remove(self, step: int) -> None:
        """state.json first: half a checkpoint must not look like one."""
        path = f"{self._path}/step_{step}"
        self._filesystem.invalidate_cache()
        if self._filesystem.exists(f"{path}/{STATE}"):
            self._filesystem.rm_file(f"{path}/{STATE}")
        for name in self._filesystem.find(path):  # rm would take a name of a run for a pattern
            self._filesystem.rm_file(name)
