"""Object stores through fsspec: s3://, gs://, and whatever else has an fsspec package.

Credentials, region and endpoint are the store's own variables (AWS_ACCESS_KEY_ID,
AWS_ENDPOINT_URL, GOOGLE_APPLICATION_CREDENTIALS, ...), in the environment of every rank.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from moe_router.config import DataConfig
from moe_router.errors import ConfigError, DataError

_EXTRA = {"s3": "pip install 'moe-router[s3]'", "gs": "pip install 'moe-router[gs]'"}


def is_remote(path: str) -> bool:
    return "://" in path


def open_remote(url: str, key: str) -> tuple[Any, str]:
    """The fsspec filesystem of a URL, and the path in it.

    Args:
        key: of the config that holds the URL, for the message.

    Raises:
        ConfigError: no such kind of store, or its package is not installed.
    """
    scheme = url.split("://")[0]
    try:
        import fsspec

        filesystem, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        fix = _EXTRA.get(scheme, "want s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or a path")
        raise ConfigError(f"{key}={url}: {' '.join(str(error).split())}; {fix}") from error
    return filesystem, str(path)


@contextmanager
def explained(url: str, error_type: type[Exception]) -> Iterator[None]:
    """What a store or its client says, as one line of ours."""
    try:
        yield
    except (ConfigError, error_type):
        raise
    except Exception as error:  # each client has errors of its own: no credentials, no bucket
        reason = " ".join(str(error).split()) or type(error).__name__
        raise error_type(
            f"{url}: {reason}; check the bucket, the credentials and the endpoint in the "
            "environment of every rank"
        ) from error


def with_local_data(config: DataConfig) -> DataConfig:
    """The same data, with files of an object store copied to data.cache.

    Raises:
        DataError: there is no such object, or the store refuses it.
    """

    def here(path: str | None, key: str) -> str | None:
        remote = path is not None and is_remote(path)
        return _copied(path, Path(config.cache), key) if path and remote else path

    path, val_path = here(config.path, "data.path"), here(config.val_path, "data.val_path")
    return replace(config, path=path, val_path=val_path)


def _copied(url: str, cache: Path, key: str) -> str:
    """A local copy of a file, or of all files below a prefix; made once for each version of it."""
    filesystem, path = open_remote(url, key)
    with explained(url, DataError):
        if filesystem.isfile(path):
            found = {Path(path).name: path}
        else:
            found = {name[len(path) :].strip("/"): name for name in sorted(filesystem.find(path))}
        if not found:
            raise DataError(f"{key}={url}: no such object, want a file or a prefix that has some")
        versions = [str(filesystem.ukey(name)) for name in found.values()]
        mark = hashlib.sha256("\n".join([url, *versions]).encode()).hexdigest()[:16]
        folder = cache / "remote" / mark
        if not folder.is_dir():
            _download(filesystem, found, folder)
    return str(folder / next(iter(found)) if filesystem.isfile(path) else folder)


def _download(filesystem: Any, found: dict[str, str], folder: Path) -> None:
    """All of it or nothing; two processes may do it at once."""
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    for name, source in found.items():
        target = partial / name
        target.parent.mkdir(parents=True, exist_ok=True)
        filesystem.get_file(source, str(target))
    try:
        os.rename(partial, folder)
    except OSError:
        if not folder.is_dir():
            raise
        shutil.rmtree(partial, ignore_errors=True)  # another process was first, with the same
