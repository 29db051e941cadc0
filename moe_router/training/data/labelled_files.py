"""Rows of labelled files: CSV, TSV, JSON lines, or `LABEL the text`."""

from collections.abc import Iterator
from pathlib import Path

from moe_router.config import DataConfig
from moe_router.errors import DataError
from moe_router.training.data.files import near, open_content
from moe_router.training.data.sources import json_object, text_of
from moe_router.training.data.tables import table_rows


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
        return _table_rows(file, config)
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


def _table_rows(file: Path, config: DataConfig) -> Iterator[tuple[str, str, str]]:
    columns = {"data.label": config.label, "data.field": config.field}
    for where, (label, text) in table_rows(file, columns):
        yield where, label, text


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
