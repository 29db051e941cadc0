"""The saved rows of benchmarks.dense_routing as docs/results/dense_routing.md.

python -m benchmarks.dense_routing_table
"""

import json
import math
from pathlib import Path

from benchmarks.depth_tasks import TASKS, settings
from benchmarks.results import ROOT, Row

PAGE = ROOT.parent / "docs" / "results" / "dense_routing.md"
CONTROLS = ("frozen", "position", "equal")
HEAD = (
    "| row | quality | retained | executed FLOPs a token, p5 / p50 / p95 | FLOPs / | "
    "batch 1, ms | x | over FLOPs | a second, at batch | x | over FLOPs | "
    "peak of 256, MiB | training keeps, MiB | J / 1,000 | "
    "routers: parameters, FLOPs | soft to hard, nats |"
)
INTRO = """# Routing in depth on dense layers

One table for each task. *Quality* is accuracy, or, of text, bits per byte, of which fewer are
better. *Retained* is the accuracy over that of the dense model that was trained as long, or its
bits per byte over ours. *Soft to hard* is what the threshold costs that makes tokens leave, over a
model of the same weights in which nobody does and everybody weighs what its router says. *FLOPs /*
is by how much the executed FLOPs of the blocks, routers included, are fewer than the dense model's;
p5, p50 and p95 are over the tokens that came in (what a merged token costs is counted for the one
whose place it keeps). *x* is the wall-clock of the full dense model over ours, the same kernels and
padding-free batches, timed in turn, the many a second each at its own best batch; *over FLOPs*
divides it by the saving in FLOPs: 1 means that every FLOP saved is time saved. On a CPU the time is
that of the one thread that computes; on a GPU, in bf16, both are CUDA graphs, with bounds for the
rows where tokens halt or skip. *Peak of 256* is the most that a forward pass of 256 sequences holds
beside weights and input, not measured on a CPU. *Training keeps* is
what one step of 64 keeps for its backward pass. *J / 1,000* sequences, beside the dense model's,
each at its own best batch, is by the GPU's own counter over half a second.

Controls of a headline row: `frozen`, a random router that never learns (of `merge`: a random
projection of the tokens in the place of the keys); `position`, a router that sees no content;
`equal`, a smaller dense model that executes as many FLOPs a token and had as many steps. A learned
router beats a control if it is ahead by more than one pooled standard deviation over at least three
seeds; with fewer seeds nothing is claimed, whatever the sign.
"""


def table(name: str, rows: list[Row]) -> list[str]:
    """The sections of one task, one for each device: their sizes differ."""
    order = [f"{name}/{s.name}" for s in settings(TASKS[name])]
    ours = [row for row in rows if row["name"] in order]
    lines = []
    for device in sorted({row["device"] for row in ours}):
        of = {row["name"]: row for row in ours if row["device"] == device}
        here = [of[row] for row in order if row in of]
        title = name if device.startswith("CPU") else f"{name}, {device}"
        lines += [f"## {title}", "", HEAD, "|---" * (HEAD.count("|") - 1) + "|"]
        lines += ["| " + " | ".join(cells(row)) + " |" for row in here]
        lines += ["", *verdicts(of), *shifts(here), *sources(here)]
    return lines


def cells(row: Row) -> list[str]:
    gap = row.get("soft_gap")
    std = "" if row["std"] is None else f" ± {row['std']:.4f}"
    one, many = row["one"], row["many"]
    return [
        row["name"].partition("/")[2],
        f"{row['mean']:.4f}{std}, {_seeds(row)}",
        f"{row['retained']:.1%}",
        " / ".join(f"{x / 1e6:.2f} M" for x in row["flops_p5_p50_p95"]),
        f"{row['flops_speedup']:.2f}",
        f"{one['ms']} (p90 {one['p90']})",
        f"{one['speedup']:.2f}",
        f"{one['speedup'] / row['flops_speedup']:.2f}",
        f"{many['per_second']:.0f} {row['noun']} at {many['batch']}",
        f"{many['speedup']:.2f}",
        f"{many['speedup'] / row['flops_speedup']:.2f}",
        _beside(row.get("inference_mib"), row.get("inference_mib_dense")),
        _beside(row["training_mib"], row["training_mib_dense"]),
        _beside(many.get("joules_per_1000"), many.get("dense_joules_per_1000")),
        f"{row['router_parameters']} ({row['router_parameters'] / row['parameters']:.2%}), "
        f"{row['router_flops'] / row['flops']:.2%}",
        "-" if gap is None else f"{gap:+.4f}",
    ]


def _beside(ours: float | None, dense: float | None) -> str:
    return "-" if ours is None else f"{ours} (dense {dense})"


def _seeds(row: Row) -> str:
    count = len(row["seeds"])
    return f"{count} seed{'s' * (count > 1)}"


def verdicts(of: dict[str, Row]) -> list[str]:
    """How each headline row does beside its controls."""
    lines = []
    for name in sorted({n.rpartition("/")[0] for n in of if n.rpartition("/")[2] in CONTROLS}):
        if name not in of:
            continue
        said = [
            f"{control} {of[f'{name}/{control}']['mean']:.4f} "
            f"({verdict(of[name], of[f'{name}/{control}'])})"
            for control in CONTROLS
            if f"{name}/{control}" in of
        ]
        lines += [f"- {name}, {of[name]['mean']:.4f}, beside {'; '.join(said)}."]
    return [*lines, ""] if lines else []


def shifts(rows: list[Row]) -> list[str]:
    """How a row does on texts from somewhere else, beside the dense one."""
    lines = []
    for row in rows:
        if there := row.get("elsewhere"):
            found = f"{there['quality']:.4f}"
            share = there["executed"]
            spent = "" if share is None else f", executing {share:.1%} of the dense FLOPs"
            lines.append(f"- {row['name']} on texts from elsewhere: {found}{spent}.")
    return [*lines, ""] if lines else []


def verdict(row: Row, control: Row) -> str:
    """In words: ahead, not ahead, or too few seeds to say."""
    gap = row["mean"] - control["mean"]
    better = -gap if row["unit"] == "bits per byte" else gap
    if min(len(row["seeds"]), len(control["seeds"])) < 3:
        return f"{gap:+.4f}, too few seeds to claim anything"
    pooled = math.sqrt((row["std"] ** 2 + control["std"] ** 2) / 2)
    ahead = better / max(pooled, 1e-9)
    return f"{gap:+.4f}, {ahead:+.1f} pooled std: " + ("ahead" if ahead > 1 else "**not ahead**")


def sources(rows: list[Row]) -> list[str]:
    """Where the rows come from; each origin once."""
    origins = {(r["device"], r["torch"], r["commit"], r["date"]) for r in rows}
    return [
        f"{device}, torch {torch}, commit {commit}, {date}."
        for device, torch, commit, date in sorted(origins)
    ] + [""]


def skip_speed(rows: list[Row]) -> list[str]:
    """The section of benchmarks.skip_speed."""
    if not rows:
        return []
    lines = ["## Speed, memory and energy of skipping, random weights", ""]
    lines += ["| row | ms (p90) | x, of the dense row above | executed | peak MiB | J / 1,000 |"]
    lines += ["|---" * 6 + "|"]
    for row in rows:
        cells = (row["name"], f"{row['value']} ({row['p90']})", row["ratio"], row["executed"])
        more = (row.get("peak_mib"), row["joules_per_1000"])
        lines.append(f"| {' | '.join('-' if x is None else str(x) for x in cells + more)} |")
    return [*lines, "", *sources(rows)]


def page(rows: list[Row], notes: str, speed: list[Row]) -> str:
    """The whole page.

    Args:
        speed: rows of benchmarks.skip_speed.
        notes: what stands after `## What it says` on the page there is; people write it.
    """
    lines = [INTRO]
    for name in TASKS:
        lines += table(name, rows)
    lines += skip_speed(speed)
    lines += [
        "## Again",
        "",
        "    python -m benchmarks.depth_files FROM DIR    # small copies, a folder a task",
        "    python -m benchmarks.dense_routing --data DIR --seeds 0,1,2 --save",
        "    # one GPU, five minutes; what that does not reach, the next call makes",
        "    python -m benchmarks.dense_routing --data DIR --seeds 0,1,2 --save --device cuda \\",
        "        --workers 15 --seconds 290 --timing 0.3 --scale 2 --only 'imdb/prune*,imdb/halt*'",
        "    python -m benchmarks.skip_speed --save    # a GPU, under two minutes",
        "    python -m benchmarks.dense_routing_table",
        "",
    ]
    return "\n".join(lines) + notes


def main() -> None:
    found = (ROOT / "results" / f"{name}.json" for name in ("dense_routing", "skip_speed"))
    rows, speed = (json.loads(path.read_text()) if path.exists() else [] for path in found)
    PAGE.write_text(page(rows, notes_of(PAGE), speed))
    print(PAGE)


def notes_of(path: Path) -> str:
    """What people wrote on the page, which stays when its tables are made anew."""
    mark = "\n## What it says\n"
    text = path.read_text() if path.exists() else ""
    return mark + text.partition(mark)[2] if mark in text else mark


if __name__ == "__main__":
    main()
