"""Plain data against a dataclass, strictly: keys, types and defaults are read off it.

Every refusal is one line that starts with the key.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable
from typing import Any, Literal

from moe_router.errors import ConfigError
from moe_router.strict_yaml import parse_yaml

_WANTED = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text"}


def section(data: object, schema: type[Any], at: str) -> Any:
    """An instance of the dataclass `schema` from a mapping; `at` is its key, "" at the top."""
    hints, fields = typing.get_type_hints(schema), fields_of(schema)
    prefix = f"{at}." if at else ""
    if not isinstance(data, dict):
        raise ConfigError(f"{at}={shown(data)}: want a section with {', '.join(fields)}")
    for key in data:
        if key not in fields:
            hint = nearest(key, fields, prefix) or f"want one of: {', '.join(fields)}"
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
        return section(value, typing.cast(type, hint), key)
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{key}={shown(value)}: want {_wanted(hint)}")
        (item, _) = typing.get_args(hint)
        return tuple(_value(each, item, f"{key}[{i}]") for i, each in enumerate(value))
    if typing.get_origin(hint) is Literal:
        options = typing.get_args(hint)
        if isinstance(value, str) and value in options:
            return value
        near = nearest(value, options)
        raise ConfigError(
            f"{key}={shown(value)}: want {_wanted(hint)}" + (f"; {near}" if near else "")
        )
    if hint is float and isinstance(value, int | str) and not isinstance(value, bool):
        value = _number(value)
    if type(value) is not hint or (isinstance(value, float) and not math.isfinite(value)):
        raise ConfigError(f"{key}={shown(value)}: want {_wanted(hint)}{_fix(value, hint)}")
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
        return f"a section with {', '.join(fields_of(hint))}"
    return _WANTED[hint]


def fields_of(schema: Any) -> dict[str, dataclasses.Field[Any]]:
    return {field.name: field for field in dataclasses.fields(schema)}


def nearest(name: object, known: Iterable[str], prefix: str = "") -> str | None:
    close = difflib.get_close_matches(str(name), list(known), 1)
    return f"did you mean {prefix}{close[0]}?" if close else None


def shown(value: object) -> str:
    """A value as YAML writes it, on one line, not too long."""
    match value:
        case None:
            text = "null"
        case bool():
            text = str(value).lower()
        case _:
            text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:57] + "..."
