"""The curve of a tiny run, kept in the repository: a change of numbers is seen, and meant.

python -m tests.training.test_golden    # writes the file anew
"""

import json
import random
import sys
import tempfile
from pathlib import Path

import pytest

from moe_router.config_file import config_from_dict
from moe_router.training.loop import Trainer
from tests.training import work

GOLDEN = Path(__file__).parents[1] / "golden" / "tiny_curve.json"
MOE = {"bias_rate": 0.01, "jitter": 0.05, "z_loss": 0.001, "shared_hidden": 16, "null_experts": 1}


def text() -> str:
    """Sentences from a grammar: the same on every Python, unlike its documentation."""
    draw = random.Random(0)
    nouns, verbs = ["router", "expert", "token", "rank"], ["finds", "keeps", "moves", "leaves"]
    pick = [draw.getrandbits(8) for _ in range(6000)]
    words = zip(pick[::3], pick[1::3], pick[2::3], strict=True)
    lines = [f"the {nouns[a % 4]} {verbs[b % 4]} the {nouns[c % 4]}." for a, b, c in words]
    return "\n".join(lines)


def curve(folder: Path) -> dict[str, list[float]]:
    (folder / "text.txt").write_text(text())
    config = config_from_dict(
        {
            "run": {"name": "golden", "seed": 1},
            "data": {"source": "text", "path": str(folder / "text.txt"), "seq_len": 32},
            "model": work.MODEL | {"moe": work.MOE | MOE},
            "train": work.TRAIN,
        }
    )
    trainer = Trainer(config)
    records = [trainer.train_step() for _ in range(8)]
    return {
        "loss": [record.loss for record in records],
        "grad_norm": [record.grad_norm for record in records],
        "balance": [record.losses["balance"] for record in records],
        "held_out": [trainer.evaluate().bits_per_byte],
    }


def test_the_curve_is_the_one_in_the_repository(tmp_path):
    ours = curve(tmp_path)
    for name, values in json.loads(GOLDEN.read_text()).items():
        assert ours[name] == pytest.approx(values, rel=1e-5), name


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        GOLDEN.write_text(json.dumps(curve(Path(folder)), indent=1) + "\n")
    sys.exit(f"wrote {GOLDEN}")
