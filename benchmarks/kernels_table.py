"""The saved rows of benchmarks.kernels as markdown: python -m benchmarks.kernels_table."""

import json

from benchmarks.kernel_shapes import names
from benchmarks.results import ROOT, Row

HEAD = "| row | ours | p90 | best peer | its value | ratio | ceiling | goal | correct | others |"


def cells(row: Row) -> list[str]:
    others = [
        f"{name} {entry['value']}"
        for name, entry in row["peers"].items()
        if "value" in entry and name != row["best_peer"]
    ]
    ratio = row["ratio"]
    lost = ratio is not None and ratio < 1
    parts = [
        row["name"],
        f"{row['value']} {row['unit']}",
        row["p90"],
        row["best_peer"],
        row["peer_value"],
        f"**{ratio}**" if lost else ratio,
        row["ceiling"],
        row["goal"],
        "yes" if row["correct"] else f"no: {row['reason']}",
        ", ".join(others),
    ]
    return ["" if part is None else str(part) for part in parts]


def reasons(rows: list[Row]) -> list[str]:
    """Each reason once, with the rows that it keeps a peer out of."""
    kept: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for name, entry in row["peers"].items():
            if "reason" in entry:
                kept.setdefault((name, entry["reason"]), []).append(row["name"])
    return [
        f"- {name}: {reason} ({len(where)} rows: {sorted({one.split('/')[0] for one in where})})"
        for (name, reason), where in kept.items()
    ]


def main() -> None:
    rows = json.loads((ROOT / "results" / "kernels.json").read_text())
    rows.sort(key=lambda row: names().index(row["name"]))
    print(HEAD + "\n" + "|---" * HEAD.count(" | ") + "|---|")
    for row in rows:
        print("| " + " | ".join(cells(row)) + " |")
    print("\n" + "\n".join(reasons(rows)))


if __name__ == "__main__":
    main()
