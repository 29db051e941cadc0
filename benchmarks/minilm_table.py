"""The saved rows of benchmarks.minilm as docs/results/minilm.md.

python -m benchmarks.minilm_table
"""

import json
import math

from benchmarks.results import ROOT, Row

PAGE = ROOT.parent / "docs" / "results" / "minilm.md"
TASKS, SCORES = ("sst2", "banking77"), ("cosine", "correlation", "probe")
INTRO = """# A MiniLM from which tokens are pruned

all-MiniLM-L6-v2, wrapped by `moe_router.wrap(kind="prune")`: routers after the second and the
fourth of six layers each leave the share in the name, so the last two see its square. *Cosine* is
that of a sentence's embedding with the full model's, *correlation* that of the similarities of all
pairs of sentences, *probe* the accuracy of a linear probe; on sentences that no router saw.
*FLOPs* are executed ones over those of the dense layers. *Packed* is the same code without pruning:
the gain over *transformers* that is not of pruning, but of leaving padding out. Sentences a second,
in batches of 32, the three timed in turn: they compare within a row, not between rows. Of several
seeds it is the mean ± the standard deviation.

`frozen` is a random router, `position` one that sees no content, `tuned` teaches all weights. A
router has learned something if it is ahead of its controls by more than one pooled standard
deviation.
"""


def page(rows: list[Row]) -> str:
    head = ["row", "seeds", *(f"{task} {score}" for task in TASKS for score in SCORES)]
    head += ["FLOPs", "pruned", "packed", "transformers"]
    lines = [INTRO, "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    lines += ["| " + " | ".join(_cells(row)) + " |" for row in rows]
    of = {row["name"]: row for row in rows}
    learned = {name: _learned(name) for name in of}
    said = [_verdict(of[learned[name]], row) for name, row in of.items() if learned[name] in of]
    made = sorted(
        {f"{r['device']}, torch {r['torch']}, commit {r['commit']}, {r['date']}" for r in rows}
    )
    command = "    python -m benchmarks.minilm --model DIR --data DIR --save"
    return "\n".join([*lines, "", *said, "", *made, "", command, ""])


def _cells(row: Row) -> list[str]:
    scores = [_score(row[task], score) for task in TASKS for score in SCORES]
    rates = row.get("a_second", {})
    speeds = [str(rates.get(name, "")) for name in ("pruned", "packed", "transformers")]
    return [row["name"], str(row["seeds"]), *scores, str(row["executed"]), *speeds]


def _score(of: dict[str, float], score: str) -> str:
    std = of.get(f"{score}_std")
    return f"{of[score]:.3f}" + ("" if std is None else f" ± {std:.3f}")


def _learned(name: str) -> str:
    """The row whose control this one is; empty: it is none."""
    of, _, control = name.rpartition("/")
    return of if control in ("frozen", "position") else ""


def _verdict(row: Row, control: Row) -> str:
    said = []
    for task in TASKS:
        for score in ("cosine", "probe"):
            ahead = row[task][score] - control[task][score]
            stds = [one[task].get(f"{score}_std") for one in (row, control)]
            verdict = "too few seeds to claim anything"
            if None not in stds:
                pooled = math.sqrt(sum(std**2 for std in stds) / 2)
                verdict = "better" if ahead > pooled else "not better than it"
                verdict = "worse" if ahead < -pooled else verdict
            said.append(f"{task} {score} {ahead:+.3f}, {verdict}")
    return f"- {row['name']} beside {control['name']}: " + "; ".join(said) + "."


if __name__ == "__main__":
    PAGE.write_text(page(json.loads((ROOT / "results" / "minilm.json").read_text())), "utf-8")
