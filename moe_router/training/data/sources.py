"""Where documents come from, one reader for each `data.source` that holds text.

Every reader yields documents as UTF-8 bytes, one at a time; `dataset.py` makes tokens of them.
Empty documents are left out.
"""

import importlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe_router.config import DataConfig
from moe_router.errors import DataError
from moe_router.training.data.download import ENWIK8, SHAKESPEARE, PublicFile, load_public
from moe_router.training.data.files import (
    Text,
    check_utf8,
    expand,
    near,
    open_content,
    read_content,
)
from moe_router.training.data.tables import some_names, table_rows

_TEXT = (".txt", ".text", ".md", ".markdown", ".rst")
_TABLES = (".csv", ".tsv")
_LINES = (".jsonl", ".ndjson")


@dataclass(frozen=True, slots=True)
class Corpus:
    """Documents and where they are held out.

    Attributes:
        documents: UTF-8 bytes of each; those held out come last.
        held_out: how many of the last documents; None leaves it to data.val_fraction.
    """

    documents: Iterable[Text]
    held_out: int | None = None


def read_corpus(config: DataConfig) -> Corpus:
    """The documents that `config` names, read as they are asked for.

    Raises:
        DataError: a file is missing, empty, damaged or not what its source wants; also while the
            documents are read.
    """
    match config.source:
        case "pydoc":
            return pydoc(config.val_fraction)
        case "shakespeare":
            return _public(SHAKESPEARE, config)
        case "enwik8":
            return _public(ENWIK8, config)
        case "text":
            return Corpus(_each(_texts, config, _TEXT))
        case "jsonl":
            return Corpus(_each(_json_lines, config, _LINES))
        case "csv":
            return Corpus(_each(_table, config, _TABLES))
        case "shards":
            raise DataError("data.source=shards holds tokens, not text: use load_dataset")
        case "labelled":
            raise DataError("data.source=labelled holds labels beside texts: use load_dataset")
        case "images":
            raise DataError("data.source=images holds no text, want another source, or none")


def pydoc(val_fraction: float) -> Corpus:
    """The language reference that CPython carries for `help()`; one document per topic.

    A topic that is mostly a piece of a longer one is left out ("with" is a part of "compound"), or
    held-out text would be in the training text too. Every n-th topic by name is held out, because
    the end of the alphabet is all type descriptions; of the n ways to count, the one whose bytes
    are nearest to `val_fraction`.

    Source: `pydoc_data.topics` of the running Python (PSF licence; texts differ by version).
    """
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise DataError(
            "data.source=pydoc: this Python has no pydoc_data.topics, want CPython's standard "
            "library; use data.source=text with data.path"
        ) from error
    kept = _without_copies(topics)
    held = _spread([len(topics[name]) for name in kept], val_fraction)
    order = [n for i, n in enumerate(kept) if i not in held]
    order += [n for i, n in enumerate(kept) if i in held]
    return Corpus([utf8(topics[name]) for name in order], held_out=len(held))


def _without_copies(topics: dict[str, str]) -> list[str]:
    """Names, sorted, less those of which half the lines stand in one longer topic that is kept."""
    lines = {
        name: {s for line in text.splitlines() if (s := line.strip())}
        for name, text in topics.items()
    }
    kept: list[str] = []
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        if lines[name] and not any(
            2 * len(lines[name] & lines[k]) >= len(lines[name]) for k in kept
        ):
            kept.append(name)
    return sorted(kept)


def _spread(sizes: list[int], fraction: float) -> set[int]:
    """Evenly spaced indices, about `fraction` of them and of the summed sizes."""
    n, total = len(sizes), sum(sizes)
    ways = [
        {i for i in range(n) if int((i + 1 + s) * fraction) > int((i + s) * fraction)}
        for s in range(max(1, round(1 / fraction)))
    ]
    ways = [way for way in ways if 0 < len(way) < n] or [{n - 1}]
    return min(ways, key=lambda way: abs(sum(sizes[i] for i in way) / total - fraction))


def _public(file: PublicFile, config: DataConfig) -> Corpus:
    content = load_public(file, config.path, config.cache)
    held_out = content[file.train : file.train + file.val]
    return Corpus([content[: file.train], held_out], held_out=1)


def _each(
    read: Callable[[Path, str], Iterator[Text]], config: DataConfig, suffixes: tuple[str, ...]
) -> Iterator[Text]:
    """The documents of every file, in order of their names."""
    files, some = expand(config.path or "", suffixes), False
    for file in files:
        for document in read(file, config.field):
            some = True
            yield document
    if not some:
        what = "is empty" if len(files) == 1 else f"are {len(files)} empty files"
        raise DataError(f"data.path={config.path}: {what}, want text in it")


def _texts(path: Path, field: str) -> Iterator[Text]:
    """The whole file is one document; `field` has no use here."""
    text = read_content(path)
    check_utf8(text, str(path))
    text = text[3:] if text[:3].tobytes() == b"\xef\xbb\xbf" else text  # a byte order mark
    if len(text):
        yield text


def _json_lines(path: Path, field: str) -> Iterator[Text]:
    """One JSON object a line; `field` is the key of the text. Blank lines are skipped."""
    with open_content(path) as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                text = text_of(json_object(line, f"{path}:{number}"), field, f"{path}:{number}")
                if text:
                    yield utf8(text, f"{path}:{number}")


def json_object(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: {error.reason}, want UTF-8") from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: not JSON ({error.msg} at column {error.colno}), want one object a line"
        ) from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: got {type(row).__name__}, want one JSON object a line")
    return row


def text_of(row: dict[str, Any], field: str, where: str) -> str:
    if field not in row:
        raise DataError(
            f"{where}: no key {field!r} (data.field), has {some_names(row)}" + near(field, row)
        )
    if not isinstance(row[field], str):
        raise DataError(f"{where}: {field!r} is {type(row[field]).__name__}, want text")
    text: str = row[field]
    return text


def _table(path: Path, field: str) -> Iterator[Text]:
    """A header line, then rows; `field` is the column of the text. Empty texts are left out."""
    for where, (text,) in table_rows(path, {"data.field": field}):
        if text:
            yield utf8(text, where)


def utf8(text: str, where: str = "text") -> Text:
    """The bytes of a text. Raises DataError where UTF-8 cannot hold it."""
    try:
        return np.frombuffer(text.encode("utf-8"), np.uint8)
    except UnicodeEncodeError as error:  # JSON can name half of a surrogate pair
        raise DataError(f"{where}: {error.reason}, want text that UTF-8 can hold") from error
