"""Files that are whole or absent: written beside, synced, renamed."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moe_router.errors import MoeRouterError


def write_atomic(path: Path, data: bytes) -> None:
    """Replace `path` so that a reader, or a crash, sees the old bytes or the new ones.

    Raises:
        MoeRouterError: the disk refused; the old file is untouched.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with explained(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with draft.open("wb") as out:
                out.write(data)
                out.flush()
                os.fsync(out.fileno())
            os.replace(draft, path)
            _sync_folder(path.parent)
        finally:
            draft.unlink(missing_ok=True)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn the disk's refusal into one line."""
    try:
        yield
    except OSError as error:
        raise MoeRouterError(
            f"{path}: could not be written ({error.strerror or error}); want a writable folder "
            "with free space: make room or set run.dir to another disk"
        ) from error


def _sync_folder(folder: Path) -> None:
    """A rename is durable only once its folder is."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
