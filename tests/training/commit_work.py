"""What each rank of the tests of a placement's commit runs."""

import json
import os
import signal
from pathlib import Path

import torch

from moe_router.errors import ClusterError, WorkerLostError
from moe_router.placement import Placement
from moe_router.training import migrate
from moe_router.training.loop import Trainer
from moe_router.training.parallel import moe_layers
from tests.training import work

MOVED = (  # of the two layers, eight experts in five slots on two ranks
    Placement(((7, 3, 5, 1, 0), (2, 0, 6, 4, 7))),
    Placement(((4, 5, 6, 7, 0), (3, 2, 1, 0, 4))),
)


def placements(trainer):
    return [moe.placement for moe in moe_layers(trainer.model)]


def lost(rank, ranks, config, folder, when):
    """Rank 1 is killed just before it says for the `when`-th time that it is ready; what rank 0
    says and holds then, in a file: nobody asks it again."""
    trainer = Trainer(config, rank=rank, ranks=ranks)
    trainer.train_step()
    trainer.save(Path(folder), wait=True)
    trainer.train_step()
    before, held = work.local_copies(trainer), placements(trainer)
    says, said = migrate._all_say, []

    def struck(*args):
        said.append(args)
        if rank == 1 and len(said) == when:
            os.kill(os.getpid(), signal.SIGKILL)
        return says(*args)

    migrate._all_say = struck
    try:
        trainer.move_experts(MOVED)
        error = "none"
    except WorkerLostError as loss:
        error = str(loss)
    after = work.local_copies(trainer)
    told = {
        "error": error,
        "said": len(said),
        "same": before.keys() == after.keys()
        and all(torch.equal(before[name], after[name]) for name in before),
        "placed": held == placements(trainer),
    }
    Path(folder, "told.json").write_text(json.dumps(told))


def resumed(rank, ranks, config, folder, steps):
    """From step 1: the placements found there, and the state after `steps` more."""
    trainer = Trainer(config, rank=rank, ranks=ranks)
    trainer.restore(Path(folder) / "step_1")
    found = placements(trainer)
    for _ in range(steps):
        trainer.train_step()
    return found, work.copies(trainer)


def crowded(rank, ranks, config):
    """Rank 1 has no room for what would come: what moved, and whether anything changed."""
    trainer = Trainer(config, rank=rank, ranks=ranks)
    trainer.train_step()
    before, held = work.copies(trainer), placements(trainer)
    room = migrate._Change.room
    if rank == 1:
        migrate._Change.room = lambda change: torch.empty(1 << 60)
    try:
        moved = trainer.move_experts(MOVED)
    finally:
        migrate._Change.room = room
    after = work.copies(trainer)
    same = all(torch.equal(before[name], after[name]) for name in before)
    trainer.train_step()
    return moved, same, held == placements(trainer), trainer.move_experts(MOVED)


def at_odds(rank, ranks, config):
    """Each rank is given the layers in another order."""
    trainer = Trainer(config, rank=rank, ranks=ranks)
    trainer.train_step()
    held = placements(trainer)
    try:
        trainer.move_experts(MOVED if rank == 0 else MOVED[::-1])
        error = "none"
    except ClusterError as refused:
        error = str(refused)
    unmoved = held == placements(trainer)
    return error, unmoved, trainer.train_step().step


def looks(rank, ranks, config):
    """Two looks at a load that asks for a move for which rank 0 has no room."""
    trainer = Trainer(config, rank=rank, ranks=ranks)
    trainer.train_step()
    trainer._rebalancer.restore(None)
    held, asked = placements(trainer), []
    room = migrate._Change.room

    def full(change):
        asked.append(change)
        return torch.empty(1 << 60) if rank == 0 else room(change)

    migrate._Change.room = full
    try:
        load_LE = torch.ones(2, 8, dtype=torch.float64)
        load_LE[:, 3] = 20.0
        said = [trainer._rebalancer.after_step(step, load_LE, [1.0] * 2) for step in range(1, 7)]
    finally:
        migrate._Change.room = room
    return said, len(asked), held == placements(trainer)
