"""What each rank of a training test runs; importable by the worker processes."""

import errno
import json
import os
import signal
from pathlib import Path

import torch
from safetensors import safe_open
from torch.distributed.tensor import DTensor

from moe_router.config import Config
from moe_router.config_file import config_from_dict
from moe_router.errors import CheckpointError, NonFiniteError, WorkerLostError
from moe_router.placement import Placement
from moe_router.training import parallel
from moe_router.training.checkpoint import CheckpointWriter
from moe_router.training.checkpoint_tensors import Snapshot
from moe_router.training.loop import Trainer
from moe_router.training.state import named_state

MODEL = {"layers": 2, "dim": 32, "heads": 2, "kv_heads": 1, "hidden": 48}
MOE = {"experts": 8, "top_k": 2, "hidden": 32}
TRAIN = {"steps": 20, "batch": 12, "lr": 3e-3, "warmup": 2, "eval_rows": 24, "clip_norm": 0.5}


def tiny(
    moe: dict | None = None, model: dict | None = None, cluster: dict | None = None, **train
) -> Config:
    """A config that takes milliseconds a step."""
    return config_from_dict(
        {
            "run": {"name": "tiny", "seed": 3},
            "data": {"source": "pydoc", "seq_len": 32},
            "model": MODEL | {"moe": MOE | (moe or {})} | (model or {}),
            "train": TRAIN | train,
            "cluster": cluster or {},
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


def save_at_a_server(rank, ranks, environment, *args):
    """`save_at` by a process that may be older than the server."""
    os.environ.update(environment)
    return save_at(rank, ranks, *args)


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


def left_alone(rank, ranks, config, folder):
    """Rank 1 is killed after a step; what rank 0 says then, in a file: nobody asks it again."""
    trainer = Trainer(config, rank=rank, ranks=ranks)
    trainer.train_step()
    before = local_copies(trainer)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    lost = []
    for call in (
        trainer.train_step,
        trainer.evaluate,
        lambda: trainer.save(Path(folder), wait=True),
    ):
        try:
            call()
        except WorkerLostError as error:
            lost.append(str(error))
    after = local_copies(trainer)
    unchanged = all(torch.equal(before[name], after[name]) for name in before)
    said = {"lost": lost, "unchanged": unchanged, "step": trainer.step}
    Path(folder, "said.json").write_text(json.dumps(said))


def local_copies(trainer: Trainer) -> dict[str, torch.Tensor]:
    """What lies on this rank, asked of nobody else."""
    state = named_state(trainer.model, trainer._optimizer)
    return {n: (t.to_local() if isinstance(t, DTensor) else t).clone() for n, t in state.items()}


def summed(rank, ranks, shapes, bucket):
    """Gradients 0, 1, 2, ... + rank of parameters of these shapes, summed over ranks."""
    parallel.BUCKET = bucket
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    for p in parameters:
        p.grad = torch.arange(p.numel()).view(p.shape).float() + rank
    parallel.sum_gradients(parameters)
    return [p.grad for p in parameters]


def one_sided(rank, ranks, config):
    """Weights after three steps in which every token goes to expert 0."""
    trainer = Trainer(config, rank=rank, ranks=ranks)
    for moe in parallel.moe_layers(trainer.model):
        moe.router.bias_E.copy_(torch.tensor([10.0, 0.0]))
    for _ in range(3):
        trainer.train_step()
    return {n: t for n, t in copies(trainer).items() if not n.startswith("optimizer")}


def leaning(rank, ranks, config, hot):
    """Three steps in which every token goes to the expert of one rank: how often they were taken
    again, what they reported, the weights."""
    trainer = Trainer(config, rank=rank, ranks=ranks)
    for moe in parallel.moe_layers(trainer.model):
        moe.router.bias_E[hot] = 10.0
    records = [trainer.train_step() for _ in range(3)]
    said = [(r.loss, r.losses, r.grad_norm, r.load_LE, r.executed_flops) for r in records]
    return trainer.repeated, said, copies(trainer)


def with_copies(rank, ranks, config, placement, folder, steps):
    """Steps with copies of experts on several ranks, then a checkpoint: the records, and each
    copy's weights by rank and expert."""
    contiguous = Placement.contiguous
    Placement.contiguous = classmethod(lambda cls, experts, ranks: cls(placement))
    try:
        trainer = Trainer(config, rank=rank, ranks=ranks)
        records = [trainer.train_step() for _ in range(steps)]
        trainer.save(Path(folder), wait=True)
        saved = copies(trainer)
        again = Trainer(config, rank=rank, ranks=ranks)
        again.restore(Path(folder) / f"step_{steps}")
    finally:
        Placement.contiguous = contiguous
    back = copies(again)
    same = all(torch.equal(saved[name], back[name]) for name in saved)
    return records, saved, same


def failing_write(rank, ranks, failing, folder):
    """A good checkpoint, then one for which one rank's disk is full; what each rank says of it."""
    state = {f"blocks.0.moe.experts.{rank}.down": torch.ones(2), "norm.weight": torch.ones(2)}
    writer = CheckpointWriter(rank, ranks, tiny())
    writer.save(Path(folder), 1, state, wait=True)
    write = Snapshot.write

    def refuse(self, folder):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    Snapshot.write = refuse if rank == failing else write
    try:
        writer.save(Path(folder), 2, state, wait=True)
    except CheckpointError as error:
        return str(error)
    finally:
        Snapshot.write = write
    return "no error"


def tensors_in(folder):
    """Names of all tensors in the safetensors files of a folder."""
    names = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names.update(file.keys())
    return names


def overflowing(rank, ranks, config):
    """The message of a step in which one rank's expert gives more than fp32 holds."""
    trainer = Trainer(config, rank=rank, ranks=ranks)
    if rank == 1:
        trainer.model.blocks[0].moe.experts.down.data.mul_(1e38).mul_(1e38)
        trainer.model.blocks[0].moe.experts.down.data.clamp_(-3e38, 3e38)
        trainer.model.blocks[0].moe.experts.gate_up.data.mul_(1e15)
    try:
        trainer.train_step()
    except NonFiniteError as error:
        return str(error)
    return "no error"


def recorded(rank, ranks, config, steps, run_dir):
    """Records of steps whose routing is written to run_dir."""
    trainer = Trainer(config, rank=rank, ranks=ranks, run_dir=Path(run_dir))
    return [trainer.train_step() for _ in range(steps)]
