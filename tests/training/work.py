"""What each rank of a training test runs; importable by the worker processes."""

from pathlib import Path

import torch

from moe_router.config import Config
from moe_router.config_file import config_from_dict
from moe_router.training.loop import Trainer
from moe_router.training.state import named_state

MODEL = {"layers": 2, "dim": 32, "heads": 2, "kv_heads": 1, "hidden": 48}
MOE = {"experts": 8, "top_k": 2, "hidden": 32}
TRAIN = {"steps": 20, "batch": 12, "lr": 3e-3, "warmup": 2, "eval_rows": 24, "clip_norm": 0.5}


def tiny(moe: dict | None = None, model: dict | None = None, **train) -> Config:
    """A config that takes milliseconds a step."""
    return config_from_dict(
        {
            "run": {"name": "tiny", "seed": 3},
            "data": {"source": "pydoc", "seq_len": 32},
            "model": MODEL | {"moe": MOE | (moe or {})} | (model or {}),
            "train": TRAIN | train,
        }
    )


def copies(trainer: Trainer) -> dict[str, torch.Tensor]:
    """The whole state of a trainer, by global name, on the host."""
    state = named_state(trainer.model, trainer._optimizer)
    full = {n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in state.items()}
    return {name: tensor.to("cpu", copy=True) for name, tensor in full.items()}


def curve(rank, ranks, config, steps, device="cpu"):
    """Train from the seed: the records, the evaluation, the state."""
    device = f"cuda:{rank}" if device == "cuda" else device
    trainer = Trainer(config, rank=rank, ranks=ranks, device=device)
    records = [trainer.train_step() for _ in range(steps)]
    return records, trainer.evaluate(), copies(trainer)


def save_at(rank, ranks, config, folder, at, steps):
    """Train `steps` steps and write a checkpoint after `at` of them."""
    trainer = Trainer(config, rank=rank, ranks=ranks)
    for step in range(steps):
        if step == at:
            trainer.save(Path(folder))
            saved = copies(trainer)
        trainer.train_step()
    trainer.close()
    return saved, copies(trainer)


def restored(rank, ranks, config, step_dir, steps):
    """A fresh trainer from a checkpoint: its state, then `steps` steps, then its state."""
    trainer = Trainer(config, rank=rank, ranks=ranks)
    trainer.restore(Path(step_dir))
    first = copies(trainer)
    records = [trainer.train_step() for _ in range(steps)]
    return trainer.step, first, records, copies(trainer)


def poisoned(rank, ranks, config, name):
    """The message of a step with a NaN in one weight, and whether the weights stayed."""
    trainer = Trainer(config, rank=rank, ranks=ranks)
    trainer.train_step()
    if rank == ranks - 1:
        dict(trainer.model.named_parameters())[name].data.flatten()[0] = float("nan")
    before = copies(trainer)
    try:
        trainer.train_step()
    except ArithmeticError as error:
        after = copies(trainer)
        same = all(
            torch.equal(
                before[n],
                after[n],
            )
            or before[n].isnan().any()
            for n in before
        )
        return str(error), same, trainer.step
    return "no error", False, trainer.step
