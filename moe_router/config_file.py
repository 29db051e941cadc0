"""From a YAML file and `--set key=value` to a `Config`, strictly, and back to plain data.

The schema is the dataclasses of `config.py` and nothing else: keys, types, defaults and ranges are
read off them. Every refusal is one line that starts with the file.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from moe_router.config import Config
from moe_router.errors import ConfigError
from moe_router.strict_schema import fields_of, nearest, section, shown
from moe_router.strict_yaml import parse_yaml

Schema = TypeVar("Schema")
_PACKAGE = Path(__file__).parent
# a wheel carries them inside the package (setup.py), a checkout beside it
_SHIPPED = (_PACKAGE / "configs", _PACKAGE.parent / "configs")


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Read a run's config.

    Args:
        path: a YAML file, or the name of one that is shipped; see `find_config`.
        overrides: "a.b.c=value", later ones win; the value is YAML.

    Raises:
        ConfigError: the first thing that is wrong, in one line that starts with the file.
    """
    source = str(path)
    data = _read(find_config(path), source, Config)
    return config_from_dict(override(data, overrides, source), source)


def read_section(path: Path, schema: type[Schema], overrides: Sequence[str] = ()) -> Schema:
    """A YAML file as the dataclass `schema`, as strictly as a config.

    Args:
        overrides: as of `load_config`.

    Raises:
        ConfigError: the first thing that is wrong, in one line that starts with the file.
    """
    source = str(path)
    data = override(_read(path, source, schema), overrides, source)
    return _checked(data, schema, source)


def find_config(name_or_path: Path | str) -> Path:
    """The file itself if there is one; else the shipped config that is called so.

    Args:
        name_or_path: a path, "quickstart", "quickstart.yaml" or "configs/quickstart.yaml".

    Raises:
        ConfigError: there is neither.
    """
    path = Path(name_or_path)
    if path.is_file():
        return path
    known = shipped_configs()
    if str(path.parent) in (".", "configs") and path.suffix in ("", ".yaml"):
        found = known.get(path.stem)
        if found is not None:
            return found
    what = "is a folder" if path.is_dir() else "no such file"
    hint = nearest(path.stem, known) or f"want a YAML file or one of: {', '.join(known)}"
    raise ConfigError(f"{name_or_path}: {what}; {hint}")


def shipped_configs() -> dict[str, Path]:
    """Name to path of every config that comes with the package."""
    folder = next((f for f in _SHIPPED if f.is_dir()), _SHIPPED[0])
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def config_from_dict(data: dict[str, Any], source: str = "config") -> Config:
    """Check plain data against the schema.

    Args:
        data: nested dicts, as YAML gives them.
        source: what error lines start with.

    Raises:
        ConfigError: unknown or missing key, wrong type, or a value out of range.
    """
    return _checked(data, Config, source)


def config_to_dict(config: Config) -> dict[str, Any]:
    """Plain data that `config_from_dict` takes back; every key is there."""
    return dataclasses.asdict(config)


def override(
    data: dict[str, Any], overrides: Sequence[str], source: str = "config"
) -> dict[str, Any]:
    """`data`, changed by each "a.b.c=value" in turn; the value is YAML.

    Args:
        data: nested dicts; changed in place.
        source: what error lines start with.

    Raises:
        ConfigError: an override is not of that form, or goes through a value.
    """
    for each in overrides:
        _put(data, each, source)
    return data


def _checked(data: dict[str, Any], schema: type[Schema], source: str) -> Schema:
    try:
        found: Schema = section(data, schema, "")
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    return found


def _read(path: Path, source: str, schema: type[Any]) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{source}: not UTF-8 at byte {error.start}; save it as UTF-8") from error
    except OSError as error:
        raise ConfigError(f"{source}: cannot be read ({error.strerror}); check the file") from error
    data = parse_yaml(text, source)
    if not isinstance(data, dict):
        got = "is empty" if data is None else f"holds {shown(data)}"
        raise ConfigError(f"{source}: {got}; want the sections {', '.join(fields_of(schema))}")
    return data


def _put(data: dict[str, Any], override: str, source: str) -> None:
    """Put the value of "a.b.c=value" in its place."""
    key, equals, text = override.partition("=")
    names = key.strip().split(".")
    if not equals or not all(names):
        raise ConfigError(
            f"{source}: --set {override}: want key=value, such as --set train.steps=100"
        )
    part = data
    for depth, name in enumerate(names[:-1], 1):
        if part.get(name) is None:
            part[name] = {}
        part = part[name]
        if not isinstance(part, dict):
            raise ConfigError(
                f"{source}: --set {override}: {'.'.join(names[:depth])} is {shown(part)}, "
                "not a section; set it without a dot"
            )
    part[names[-1]] = parse_yaml(text, f"{source}: --set {override}")
