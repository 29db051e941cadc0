"""Columns of CSV and TSV files, by their names in the header line."""

import csv
import io
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from moe_router.errors import DataError
from moe_router.training.data.files import near, open_content


def table_rows(path: Path, columns: dict[str, str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Where each row stands, and its values. Tabs separate in a .tsv, commas elsewhere.

    Args:
        columns: names of the columns, by the key of the config that says them.

    Raises:
        DataError: a column is missing, a row is too short; not UTF-8, not CSV.
    """
    delimiter = "\t" if ".tsv" in (suffix.lower() for suffix in path.suffixes) else ","
    limit = csv.field_size_limit(sys.maxsize)  # the default refuses documents above 128 KiB
    try:
        with open_content(path) as stream:
            lines = io.TextIOWrapper(stream, "utf-8-sig", newline="")
            yield from _columns(csv.reader(lines, delimiter=delimiter), columns, path)
    finally:
        csv.field_size_limit(limit)


def _columns(
    reader: Any, columns: dict[str, str], path: Path
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Reader is a csv.reader, whose type has no public name."""
    try:
        header: list[str] = next(reader, [])
        for key, name in columns.items():
            if name not in header:
                raise DataError(
                    f"{path}:1: no column {name!r} ({key}), has {some_names(header)}"
                    + near(name, header)
                )
        at = [header.index(name) for name in columns.values()]
        last = max(at)
        for row in reader:
            if row and last >= len(row):
                raise DataError(
                    f"{path}:{reader.line_num}: {len(row)} columns, want at least {last + 1} to "
                    f"reach {header[last]!r}"
                )
            if row:
                yield f"{path}:{reader.line_num}", tuple(row[i] for i in at)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8 after line {reader.line_num} ({error.reason}), want UTF-8"
        ) from error
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: not CSV ({error})") from error


def some_names(names: Iterable[str]) -> str:
    """The first few, for an error."""
    known = list(names)
    return ", ".join(map(repr, known[:8])) + (", …" if len(known) > 8 else "") or "none"
