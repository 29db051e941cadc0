"""Opening `runs/NAME`: a new run, one to go on with, or a refusal that says why."""

import contextlib
import fcntl
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from moe_router.config import Config
from moe_router.config_file import config_from_dict, config_to_dict
from moe_router.errors import ConfigError
from moe_router.observability.files import explained, write_atomic

# how a run is computed and how its sample is drawn may change; what it learns may not
_FREE = ("cluster.", "serve.", "run.dir", "run.storage")


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Attributes:
    path: absolute.
    finished: nothing is left to do.
    """

    path: Path
    finished: bool


@contextlib.contextmanager
def open_run(config: Config, *, restart: bool) -> Iterator[RunFolder]:
    """Hold `run.dir/run.name` for this process.

    Args:
        restart: move what is there aside, to NAME.old-TIMESTAMP.

    Raises:
        ConfigError: another process trains there, the folder is something else, or its run has
            another config.
    """
    path = (Path(config.run.dir) / config.run.name).absolute()
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.parent / f".{path.name}.lock", path):
        if restart and path.exists():
            path.rename(_aside(path))
        folder = _look(path, config_to_dict(config))
        if not folder.finished:
            text = yaml.safe_dump(config_to_dict(config), sort_keys=False)
            write_atomic(path / "config.yaml", text.encode())
        yield folder


def differing(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Lines "key: old -> new" of what makes these two different runs."""
    a, b = _flat(old), _flat(new)
    keys = [key for key in sorted(a.keys() | b.keys()) if not key.startswith(_FREE)]
    changed = [key for key in keys if a.get(key) != b.get(key)]
    return [f"{key}: {_shown(a.get(key))} -> {_shown(b.get(key))}" for key in changed]


def _shown(value: Any) -> str:
    """As YAML writes it."""
    return json.dumps(value) if value is None or isinstance(value, bool | list) else str(value)


def _look(path: Path, wanted: dict[str, Any]) -> RunFolder:
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return RunFolder(path, False)
    saved = path / "config.yaml"
    if not saved.is_file():
        raise ConfigError(
            f"{path}: exists, but is no run (no config.yaml); choose another run.name, or move it "
            "aside with --restart"
        )
    # through the schema: a run of before has no keys that came since, and means their defaults
    changed = differing(config_to_dict(config_from_dict(_read(saved), str(saved))), wanted)
    began = any(entry != saved for entry in path.iterdir())  # a typo in data.path is told before
    if changed and began:
        raise ConfigError(
            f"{path}: holds a run with another config ({'; '.join(changed)}); choose another "
            "run.name, or move the old run aside with --restart"
        )
    return RunFolder(path, (path / "summary.json").is_file())


def _read(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        first = str(error).splitlines()[0]
        raise ConfigError(f"{path}: not YAML ({first}); move the run aside by --restart") from error
    return found if isinstance(found, dict) else {}


def _flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _aside(path: Path) -> Path:
    name = f"{path.name}.old-{time.strftime('%Y%m%d-%H%M%S')}"
    names = (path.with_name(name + more) for more in ("", *(f".{n}" for n in range(1, 1000))))
    return next(candidate for candidate in names if not candidate.exists())


@contextlib.contextmanager
def _locked(lock: Path, path: Path) -> Iterator[None]:
    """The kernel lets go of the lock when the process ends, however it ends."""
    with explained(lock):
        file = lock.open("w")
    with file as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{path}: another process trains there; wait for it, or choose another run.name"
            ) from None
        yield
