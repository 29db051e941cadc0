"""Rows of labelled files: CSV, TSV, JSON lines, or `LABEL the text`."""

import csv
import io
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from moe_router.config import DataConfig
from moe_router.errors import DataError
from moe_router.training.data.files import near, open_content
from moe_router.training.data.sources import json_object, text_of


def labelled_rows(file: Path, config: DataConfig) -> Iterator[tuple[str, str, str]]:
    """Where it stands, label and text of each document, by what the file's name ends in.

    Raises:
        DataError: no such column or key, a row without it, or not UTF-8, CSV or JSON; also while
            the rows are read.
    """
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if {".jsonl", ".ndjson"} & set(suffixes):
        return _json_rows(file, config)
    if {".csv", ".tsv"} & set(suffixes):
        return _table_rows(file, config, "\t" if ".tsv" in suffixes else ",")
    return _line_rows(file)


def _json_rows(file: Path, config: DataConfig) -> Iterator[tuple[str, str, str]]:
    with open_content(file) as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                where = f"{file}:{number}"
                row = json_object(line, where)
                label = row.get(config.label)
                if config.label not in row or isinstance(label, dict | list | None):
                    raise DataError(
                        f"{where}: no label under {config.label!r} (data.label), has "
                        f"{', '.join(map(repr, row))}" + near(config.label, row)
                    )
                yield where, str(label), text_of(row, config.field, where)


def _table_rows(file: Path, config: DataConfig, delimiter: str) -> Iterator[tuple[str, str, str]]:
    limit = csv.field_size_limit(sys.maxsize)  # the default refuses texts above 128 KiB
    try:
        with open_content(file) as stream:
            reader = csv.reader(
                io.TextIOWrapper(stream, "utf-8-sig", newline=""), delimiter=delimiter
            )
            yield from _columns(reader, file, (config.label, config.field))
    finally:
        csv.field_size_limit(limit)


def _columns(reader: Any, file: Path, names: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """Reader is a csv.reader, whose type has no public name."""
    try:
        header: list[str] = next(reader, [])
        for key, name in zip(("data.label", "data.field"), names, strict=True):
            if name not in header:
                raise DataError(
                    f"{file}:1: no column {name!r} ({key}), has {', '.join(map(repr, header))}"
                    + near(name, header)
                )
        at = [header.index(name) for name in names]
        for row in reader:
            where = f"{file}:{reader.line_num}"
            if row and len(row) <= max(at):
                raise DataError(f"{where}: {len(row)} columns, want at least {max(at) + 1}")
            if row:
                yield where, row[at[0]], row[at[1]]
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file}: {error.reason} after line {reader.line_num}, want UTF-8"
        ) from error
    except csv.Error as error:
        raise DataError(f"{file}:{reader.line_num}: not CSV ({error})") from error


def _line_rows(file: Path) -> Iterator[tuple[str, str, str]]:
    """`LABEL the text`, one document a line."""
    with open_content(file) as stream:
        for number, line in enumerate(stream, 1):
            where = f"{file}:{number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                raise DataError(f"{where}: {error.reason}, want UTF-8") from error
            if text:
                label, _, rest = text.partition(" ")
                yield where, label, rest.strip()
