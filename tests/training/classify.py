"""A tiny labelled set and what each rank of a classifier's test runs; importable by workers."""

import random

from moe_router.config_file import config_from_dict
from moe_router.training.loop import Trainer

MOE = {"moe": {"experts": 4, "top_k": 2, "hidden": 24, "z_loss": 0.01}}


def write(folder):
    """Texts whose label is which of two words they hold, at a random place."""
    path = folder / "texts.txt"
    if not path.exists():
        draw = random.Random(0)
        lines = []
        for _ in range(240):
            label = draw.randint(0, 1)
            words = draw.choices(["a", "film", "the", "it", "is"], k=draw.randint(1, 6))
            words.insert(draw.randint(0, len(words)), ["dull", "good"][label])
            lines.append(f"{label} {' '.join(words)}")
        path.write_text("\n".join(lines))
    return path


def plain(folder, *, data=(), model=(), train=()):
    return {
        "run": {"name": "labels", "seed": 5},
        "data": {
            "source": "labelled", "path": str(write(folder)), "labels": ["0", "1"], "seq_len": 24,
        } | dict(data),
        "model": {
            "kind": "encoder", "layers": 2, "dim": 32, "heads": 4, "kv_heads": 2, "hidden": 48,
            "routing": {"kind": "prune", "keep": 0.5, "every": 1, "first": 0},
        } | dict(model),
        "train": {"steps": 8, "batch": 8, "warmup": 2, "eval_rows": 24} | dict(train),
    }  # fmt: skip


def config(folder, **more):
    return config_from_dict(plain(folder, **more))


def curve(rank, ranks, config, steps):
    """Records of some steps, and the evaluation after them."""
    trainer = Trainer(config, rank=rank, ranks=ranks)
    return [trainer.train_step() for _ in range(steps)], trainer.evaluate()
