"""The saved rows of benchmarks.minilm and benchmarks.minilm_tuned as docs/results/minilm.md.

python -m benchmarks.minilm_table
"""

import json
import math

from benchmarks.minilm_models import ROWS
from benchmarks.results import ROOT, Row

PAGE = ROOT.parent / "docs" / "results" / "minilm.md"
TASKS, SCORES = ("sst2", "banking77"), ("cosine", "correlation", "probe")
ORDER = ["full", *ROWS]
CONTROLS = ("frozen", "position", "norm", "attention", "gradient")
DRAWN_NOTHING = ("norm", "attention")  # no seed changes them
INTRO = """# A MiniLM from which tokens are pruned

all-MiniLM-L6-v2, wrapped by `moe_router.wrap(kind="prune")`: routers after the second and the
fourth of six layers each leave the share in the name, so the last two see its square; the model
itself stays as it is. *Cosine* is that of a sentence's embedding with the full model's,
*correlation* that of the similarities of all pairs of sentences, *probe* the accuracy of a linear
probe; on sentences that no router saw. *FLOPs* are executed ones over those of the dense layers.
*Packed* is the same code without pruning: the gain over *transformers* that is not of pruning, but
of leaving padding out. Sentences a second, in batches of 32 (on a GPU 4096, in bf16), tokenised
before, the three timed in turn: they compare within a row, not between rows. Of several seeds it is
the mean ± the standard deviation.

Routers (`mlp`, with `linear` beside it) are taught in 120 steps of 32 sentences by trials
([trial.py](../../moe_router/layers/trial.py)): tokens leave by chance, twice, and the logits of
those that left are regressed on the difference of the two losses, 1 - cosine with the full
embedding. Beside them: `gradient`, the same router taught by the gradient of that loss through what
stayed; `frozen`, a random router; `position`, taught by trials and blind to content; `norm`, the
longest states stay; `attention`, `router="attention"`, those that most attention comes to. `merge`
rows join tokens instead (`kind="merge"`), without learning anything. A router has learned something
if it is ahead of its controls by more than one pooled standard deviation. That is of seeds; a probe
is tested on 300 sentences, so its accuracy is uncertain by 0.023 whatever the seed.
"""

TUNED = """## Fine-tuned on SST-2

The same model with a head for two labels, fine-tuned for two epochs of the 6,920 training
sentences; then its weights stay and routers learn by trials on the loss of the labels. *Accuracy*
is that of the 2,693 sentences of the development and the test part; sentences a second at 256, one
thread. `python -m benchmarks.minilm_tuned` says more.
"""
SAYS = "### What it says\n"


def tuned(rows: list[Row], notes: str) -> list[str]:
    """The section of benchmarks.minilm_tuned.

    Args:
        notes: what people wrote at its end.
    """
    if not rows:
        return []
    head = ("row", "accuracy", "seeds", "retained", "FLOPs", "routed", "packed", "transformers")
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        seeds = row["seeds"] if isinstance(row["seeds"], list) else [row["value"]]
        std = f" ± {row['std']:.4f}" if row.get("std") else ""
        rates = [str(row.get("a_second", {}).get(of, "")) for of in head[-3:]]
        cells = (f"{row['value']:.4f}{std}", len(seeds), f"{row.get('retained', 1):.1%}")
        said = [row["name"], *map(str, cells), str(row.get("executed", 1.0)), *rates]
        lines.append(f"| {' | '.join(said)} |")
    origins = sorted({f"{r['device']}, {r['torch']}, {r['commit']}, {r['date']}" for r in rows})
    command = "    python -m benchmarks.minilm_tuned --model DIR --data DIR --tuned DIR --save"
    return [TUNED, *lines, "", *origins, "", command, "", notes]


def page(rows: list[Row]) -> str:
    head = ["row", "seeds", *(f"{task} {score}" for task in TASKS for score in SCORES)]
    head += ["FLOPs", "routed", "packed", "transformers"]
    parts = [INTRO]
    for device in sorted({row["device"] for row in rows}):
        here = [row for row in rows if row["device"] == device]
        here.sort(key=lambda row: ORDER.index(row["name"]))
        parts += [f"## {device}", ""]
        parts += ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
        parts += ["| " + " | ".join(_cells(row)) + " |" for row in here]
        of = {row["name"]: row for row in here}
        learned = {name: _learned(name) for name in of}
        parts += ["", *(_verdict(of[learned[n]], of[n]) for n in of if learned[n] in of), ""]
        parts += sorted({f"torch {r['torch']}, commit {r['commit']}, {r['date']}" for r in here})
        parts.append("")
    command = "    python -m benchmarks.minilm --model DIR --data DIR --save"
    return "\n".join([*parts, command, ""])


def _cells(row: Row) -> list[str]:
    scores = [_score(row[task], score) for task in TASKS for score in SCORES]
    rates = row.get("a_second", {})
    speeds = [str(rates.get(name, "")) for name in ("routed", "packed", "transformers")]
    return [row["name"], str(row["seeds"]), *scores, str(row["executed"]), *speeds]


def _score(of: dict[str, float], score: str) -> str:
    std = of.get(f"{score}_std")
    return f"{of[score]:.3f}" + ("" if std is None else f" ± {std:.3f}")


def _learned(name: str) -> str:
    """The row whose control this one is; empty: it is none."""
    of, _, control = name.rpartition("/")
    return of if control in CONTROLS else ""


def _verdict(row: Row, control: Row) -> str:
    said = []
    for task in TASKS:
        for score in SCORES:
            ahead = row[task][score] - control[task][score]
            stds = [row[task].get(f"{score}_std"), control[task].get(f"{score}_std")]
            if control["name"].rpartition("/")[2] in DRAWN_NOTHING:
                stds[1] = 0.0
            verdict = "too few seeds to claim anything"
            if None not in stds:
                pooled = math.sqrt(sum(std**2 for std in stds) / 2)
                verdict = "better" if ahead > pooled else "not better than it"
                verdict = "worse" if ahead < -pooled else verdict
            said.append(f"{task} {score} {ahead:+.3f}, {verdict}")
    return f"- {row['name']} beside {control['name']}: " + "; ".join(said) + "."


def main() -> None:
    rows, more = (
        json.loads((ROOT / "results" / f"{name}.json").read_text())
        for name in ("minilm", "minilm_tuned")
    )
    notes = SAYS + PAGE.read_text("utf-8").partition(SAYS)[2]
    PAGE.write_text("\n".join([page(rows), *tuned(more, notes)]), "utf-8")


if __name__ == "__main__":
    main()
