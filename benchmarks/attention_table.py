"""The saved rows of benchmarks.attention as markdown: python -m benchmarks.attention_table."""

import json

from benchmarks.attention_tiles import TILED
from benchmarks.results import ROOT, Row

SPEED = ("row", "ours, us", "share of pairs", "TFLOP/s of them", "choosing, us", "peak MiB",
         "best dense", "its us", "its peak MiB", "times faster", "goal", "others, us")  # fmt: skip


def line(cells: tuple[object, ...]) -> str:
    return "| " + " | ".join("" if cell is None else str(cell) for cell in cells) + " |"


def head(names: tuple[str, ...]) -> str:
    return line(names) + "\n|" + "---|" * len(names)


def speed(row: Row) -> str:
    """A row of the first table; why there is no time, if there is none."""
    if row["value"] is None:
        return line((row["name"], f"none: {row['reason']}", *[None] * (len(SPEED) - 2)))
    peers, best = row["peers"], row["best_peer"]
    others = [f"{n} {e.get('value') or e['reason']}" for n, e in peers.items() if n != best]
    ratio = row["ratio"]
    lost = ratio is not None and ratio < (row["goal"] or 1)
    return line((
        row["name"], row["value"], row["share"], row["tflops"], row["selection_us"],
        row["peak_mib"], best, row["peer_value"], peers[best]["peak_mib"] if best else None,
        f"**{ratio}**" if lost else ratio, row["goal"], ", ".join(others),
    ))  # fmt: skip


def tokens(row: Row) -> int:
    return int(row["name"].rsplit("/T", 1)[1])


def table(rows: list[Row]) -> str:
    timed = [row for row in rows if row["name"].startswith("forward")]
    timed.sort(key=lambda row: (row["name"].split("/")[:2], tokens(row)))
    parts = [head(SPEED), *map(speed, timed), ""]
    cuts = {row["name"]: row for row in rows if row["name"].startswith("tiles/")}
    kinds = [f"{kind}/T{T}" for T, kind in TILED.items()]
    parts.append(head(("kernel", "tile", *(f"{kind}, TFLOP/s" for kind in kinds), "taken")))
    for kernel, tile in dict.fromkeys(tuple(name.split("/")[1:3]) for name in cuts):
        found = [cuts.get(f"tiles/{kernel}/{tile}/{kind}", {}) for kind in kinds]
        cut = next(row["cut"] for row in found if "cut" in row)
        values = [row.get("value") for row in found]
        parts.append(line((kernel, f"{tile}: {cut}", *values, "yes" if found[0]["best"] else "")))
    parts.append("")
    for row in rows:
        if row["name"].startswith("growth/"):
            a, b = row["between"]
            parts.append(
                f"- {row['name']}: time grows with n to the power {row['value']} from {a} to {b} "
                f"tokens (goal: at most {row['goal']})"
            )
        if row["name"].startswith("decode/"):
            parts.append(
                f"- {row['name']}: {row['value']} us a token, dense attention to the same pages "
                f"{row['peer_value']} us"
            )
    return "\n".join(parts)


def quality(rows: list[Row]) -> str:
    """A table for each task and device: each row beside dense attention and beside ours."""
    tasks: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        task, _, name = row["name"].rpartition("/")
        tasks.setdefault((task, row["device"]), {})[name] = row
    parts = []
    for (task, device), of in tasks.items():
        any_row = next(iter(of.values()))
        names = (
            f"{task}, {any_row['unit']}",
            "mean",
            "std",
            "seeds",
            "of dense's",
            "ours is ahead",
        )
        parts += [f"{device}, {any_row['steps']} steps:", "", head(names)]
        for name, row in of.items():
            seeds = ", ".join(map(str, row["by_seed"].values()))
            beside = (_retained(row, of.get("dense")), _ahead(of.get("ours"), row))
            parts.append(line((name, row["value"], row["std"], seeds, *beside)))
        parts.append("")
    return "\n".join(parts)


def _higher_is_better(row: Row) -> bool:
    return bool(row["unit"] == "accuracy")


def _retained(row: Row, dense: Row | None) -> float | None:
    if dense is None:
        return None
    share: float = row["value"] / dense["value"]
    return round(share if _higher_is_better(row) else 1 / share, 4)


def _ahead(ours: Row | None, row: Row) -> str | None:
    """By how many pooled standard deviations."""
    if ours is None or ours is row or None in (ours["std"], row["std"]):
        return None
    gap = ours["value"] - row["value"]
    pooled = ((ours["std"] ** 2 + row["std"] ** 2) / 2) ** 0.5
    return f"{(gap if _higher_is_better(row) else -gap) / max(pooled, 1e-9):.1f} std"


def errors(rows: list[Row]) -> str:
    """The share of pairs at each length, and how it grows."""
    parts: list[str] = []
    for row in rows:
        _, source, way, error = row["name"].split("/")
        if not parts:
            lengths = [f"share at {n}" for n in row["lengths"]]
            parts.append(head(("pairs of", "chosen by", "error", *lengths, "exponent", "std")))
        parts.append(line((source, way, error, *row["share"], row["value"], row["std"])))
    return "\n".join(parts)


def main() -> None:
    files = {"attention": table, "attention_quality": quality, "attention_error": errors}
    for name, shown in files.items():
        path = ROOT / "results" / f"{name}.json"
        if path.exists():
            print(shown(json.loads(path.read_text())), end="\n\n")


if __name__ == "__main__":
    main()
