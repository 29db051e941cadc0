"""Rows that are made a seed at a time: a run that was cut short goes on where it stopped."""

import argparse
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence

from benchmarks import results
from benchmarks.results import Row, save


def add_arguments(parser: argparse.ArgumentParser, names: Sequence[str]) -> None:
    """What every benchmark by seed is told."""
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default=";".join(names), help="variants, by semicolons")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no row after these")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--save", action="store_true")


def saved(file: str, device: str) -> dict[str, Row]:
    """What was measured on such a device, by name."""
    path = results.ROOT / "results" / f"{file}.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    return {row["name"]: row for row in rows if row["device"] == device}


def missing(
    names: Sequence[str], seeds: int, rows: Mapping[str, Row], setting: Row
) -> Iterator[tuple[str, int]]:
    """Names and seeds that no row of this setting has; seed by seed, so that a short run has all
    rows of few seeds."""
    for seed in range(seeds):
        for name in names:
            row = rows.get(name, {})
            same = all(row.get(key) == value for key, value in setting.items())
            if not (same and str(seed) in row["by_seed"]):
                yield name, seed


def add(
    file: str, rows: dict[str, Row], name: str, seed: int, value: float, about: Row, setting: Row
) -> Row:
    """Take a seed's value into its row, and write it.

    Args:
        rows: by name, of `saved`; changed.
        about: what else the row says, of its last seed.
        setting: what has to be the same of all seeds: a row of another one is begun anew.
    """
    old = rows.get(name, {})
    same = all(old.get(key) == wanted for key, wanted in setting.items())
    by_seed = {**(old["by_seed"] if same else {}), str(seed): round(value, 5)}
    values = list(by_seed.values())
    std = round(statistics.stdev(values), 5) if len(values) > 1 else None
    row = {"name": name, "value": round(statistics.mean(values), 5), "std": std}
    rows[name] = row | {"by_seed": by_seed} | setting | about
    save(file, [rows[name]])
    return rows[name]
