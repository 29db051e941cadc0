"""From a YAML file and `--set key=value` to a `Config`, strictly, and back to plain data.

The schema is the dataclasses of `config.py` and nothing else: keys, types, defaults and ranges are
read off them. Every refusal is one line that starts with the file.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from moe_router.config import Config
from moe_router.errors import ConfigError
from moe_router.strict_yaml import parse_yaml

_PACKAGE = Path(__file__).parent
# a wheel carries them inside the package (setup.py), a checkout beside it
_SHIPPED = (_PACKAGE / "configs", _PACKAGE.parent / "configs")
_WANTED = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text"}


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Read a run's config.

    Args:
        path: a YAML file, or the name of one that is shipped; see `find_config`.
        overrides: "a.b.c=value", later ones win; the value is YAML.

    Raises:
        ConfigError: the first thing that is wrong, in one line that starts with the file.
    """
    source = str(path)
    data = _read(find_config(path), source)
    return config_from_dict(override(data, overrides, source), source)


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
    hint = _nearest(path.stem, known) or f"want a YAML file or one of: {', '.join(known)}"
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
    try:
        config: Config = _section(data, Config, "")
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    return config


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


def _read(path: Path, source: str) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{source}: not UTF-8 at byte {error.start}; save it as UTF-8") from error
    except OSError as error:
        raise ConfigError(f"{source}: cannot be read ({error.strerror}); check the file") from error
    data = parse_yaml(text, source)
    if not isinstance(data, dict):
        got = "is empty" if data is None else f"holds {_shown(data)}"
        raise ConfigError(f"{source}: {got}; want the sections {', '.join(_fields(Config))}")
    return data


def _put(data: dict[str, Any], override: str, source: str) -> None:
    """Put the value of "a.b.c=value" in its place."""
    key, equals, text = override.partition("=")
    names = key.strip().split(".")
    if not equals or not all(names):
        raise ConfigError(
            f"{source}: --set {override}: want key=value, such as --set train.steps=100"
        )
    section = data
    for depth, name in enumerate(names[:-1], 1):
        if section.get(name) is None:
            section[name] = {}
        section = section[name]
        if not isinstance(section, dict):
            raise ConfigError(
                f"{source}: --set {override}: {'.'.join(names[:depth])} is {_shown(section)}, "
                "not a section; set it without a dot"
            )
    section[names[-1]] = parse_yaml(text, f"{source}: --set {override}")


def _section(data: object, schema: type[Any], at: str) -> Any:
    """An instance of the dataclass `schema` from a mapping; `at` is its key, "" at the top."""
    hints, fields = typing.get_type_hints(schema), _fields(schema)
    prefix = f"{at}." if at else ""
    if not isinstance(data, dict):
        raise ConfigError(f"{at}={_shown(data)}: want a section with {', '.join(fields)}")
    for key in data:
        if key not in fields:
            hint = _nearest(key, fields, prefix) or f"want one of: {', '.join(fields)}"
            raise ConfigError(f"{prefix}{key}: unknown key; {hint}")
    for name, field in fields.items():
        required = field.default is field.default_factory is dataclasses.MISSING
        if required and name not in data:
            raise ConfigError(f"{prefix}{name}: missing key; add it, want {_wanted(hints[name])}")
    # by the order of the schema, so that the first complaint does not depend on the file's order
    values = {k: _value(data[k], hints[k], prefix + k) for k in fields if k in data}
    return schema(**values)


def _value(value: object, hint: Any, key: str) -> Any:
    """`value` as the annotation `hint` wants it."""
    if isinstance(hint, types.UnionType):
        if value is None:
            return None
        hint = next(option for option in typing.get_args(hint) if option is not types.NoneType)
    if dataclasses.is_dataclass(hint):
        return _section(value, typing.cast(type, hint), key)
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{key}={_shown(value)}: want {_wanted(hint)}")
        (item, _) = typing.get_args(hint)
        return tuple(_value(each, item, f"{key}[{i}]") for i, each in enumerate(value))
    if typing.get_origin(hint) is Literal:
        options = typing.get_args(hint)
        if isinstance(value, str) and value in options:
            return value
        near = _nearest(value, options)
        raise ConfigError(
            f"{key}={_shown(value)}: want {_wanted(hint)}" + (f"; {near}" if near else "")
        )
    if hint is float and isinstance(value, int | str) and not isinstance(value, bool):
        value = _number(value)
    if type(value) is not hint or (isinstance(value, float) and not math.isfinite(value)):
        raise ConfigError(f"{key}={_shown(value)}: want {_wanted(hint)}{_fix(value, hint)}")
    return value


def _number(value: int | str) -> object:
    """A float, also from "1e-3", which YAML 1.1 takes for text because it has no dot."""
    try:
        return float(value)
    except (ValueError, OverflowError):
        return value


def _fix(value: object, hint: type) -> str:
    """How to write what was probably meant, "" if the wanted type says it all."""
    if hint is str and value is not None:
        return f"; put it in quotes: '{value}'"
    number = _number(value) if isinstance(value, str) else value
    if hint is int and isinstance(number, float) and number.is_integer():
        return f"; write {int(number)}"
    if isinstance(value, str) and _reads_as(value, hint):
        return f"; take the quotes off: {value}"
    return ""


def _reads_as(text: str, hint: type) -> bool:
    try:
        return isinstance(parse_yaml(text, ""), hint)
    except ConfigError:
        return False


def _wanted(hint: Any) -> str:
    """An annotation in words."""
    if isinstance(hint, types.UnionType):
        options = [o for o in typing.get_args(hint) if o is not types.NoneType]
        return " or ".join([*map(_wanted, options), "null"])
    if typing.get_origin(hint) is Literal:
        return " | ".join(typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return f"a list, each {_wanted(typing.get_args(hint)[0])}"
    if dataclasses.is_dataclass(hint):
        return f"a section with {', '.join(_fields(hint))}"
    return _WANTED[hint]


def _fields(schema: Any) -> dict[str, dataclasses.Field[Any]]:
    return {field.name: field for field in dataclasses.fields(schema)}


def _nearest(name: object, known: Iterable[str], prefix: str = "") -> str | None:
    close = difflib.get_close_matches(str(name), list(known), 1)
    return f"did you mean {prefix}{close[0]}?" if close else None


def _shown(value: object) -> str:
    """A value as YAML writes it, on one line, not too long."""
    match value:
        case None:
            text = "null"
        case bool():
            text = str(value).lower()
        case _:
            text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:57] + "..."
