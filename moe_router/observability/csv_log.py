"""One CSV file keyed by step: append-only while a run goes on, never a step twice.

A row leaves in one unbuffered write, so a killed process loses nothing; a machine that lost power
or a full disk may leave half a line, which is cut off when the file is opened again.
"""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from moe_router.errors import DataError
from moe_router.observability.files import explained, write_atomic

Cell = int | float | None
Row = Mapping[str, Cell]


class CsvLog:
    """Args:
    path: the file; made with its first row.
    keep: rows of later steps are removed; 0 starts the file anew.
    """

    def __init__(self, path: Path, *, keep: int) -> None:
        self.path = path
        self.columns: list[str] = []
        self._last = 0
        self.rewind(keep if keep > 0 else -1)

    def append(self, rows: Sequence[Row]) -> None:
        """Write the rows of one step; rows of that step or later that are there go first.

        Args:
            rows: each has the same "step"; new columns widen the file.

        Raises:
            MoeRouterError: the disk refused.
        """
        if not rows:
            return
        step = int(rows[0]["step"] or 0)
        if self.columns and step <= self._last:
            self.rewind(step - 1)
        added = [name for name in rows[0] if name not in self.columns]
        if added:
            kept = read_rows(self.path)
            self.columns = [*self.columns, *added]
            self._replace(kept)
        text = _lines([[_text(row.get(name)) for name in self.columns] for row in rows])
        with explained(self.path), self.path.open("ab", buffering=0) as out:
            out.write(text)
        self._last = step

    def rewind(self, step: int) -> None:
        """Remove the rows of steps after `step`, and half a line at the end, if there are any."""
        if not self.path.exists():
            self.columns, self._last = [], 0
            return
        before = self.path.read_bytes()
        rows = [row for row in read_rows(self.path) if int(row["step"]) <= step]
        self.columns = list(rows[0]) if rows else []
        self._last = int(rows[-1]["step"]) if rows else 0
        if not rows:
            with explained(self.path):
                self.path.unlink()
        elif before != self._encode(rows):
            self._replace(rows)

    def _replace(self, rows: Sequence[Mapping[str, str]]) -> None:
        write_atomic(self.path, self._encode(rows))

    def _encode(self, rows: Sequence[Mapping[str, str]]) -> bytes:
        return _lines([self.columns, *([row.get(c, "") for c in self.columns] for row in rows)])


def read_rows(path: Path) -> list[dict[str, str]]:
    """All rows of `iter_rows`."""
    return list(iter_rows(path))


def iter_rows(path: Path) -> Iterator[dict[str, str]]:
    """The whole rows of a log, oldest first; a half-written last line is left out.

    Returns:
        One dict a row, cells as written, "" where a column did not exist yet; none for no file.

    Raises:
        DataError: the file is not a log: its first column is not "step".
    """
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        # a line without its newline was being written when the machine stopped
        table = csv.reader(line for line in file if line.endswith("\n"))
        columns = next(table, ["step"])
        if columns[:1] != ["step"]:
            raise DataError(
                f"{path}: line 1 is {','.join(columns)[:60]!r}; want a header that starts with "
                "'step': move this file away"
            )
        for cells in table:
            if len(cells) == len(columns) and cells[0].isdecimal():
                yield dict(zip(columns, cells, strict=True))


def _lines(table: Sequence[Sequence[str]]) -> bytes:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(table)
    return out.getvalue().encode()


def _text(cell: Cell) -> str:
    if cell is None:
        return ""
    return str(cell) if isinstance(cell, int) else f"{cell:.9g}"
