"""What each rank of a simulation test runs; importable by the worker processes."""

import torch

from moe_router.dispatch import AllToAll
from moe_router.routing.plan import plan_from_ids
from moe_router.training.loop import Trainer
from moe_router.types import Choice


def counted(rank, ranks, placement, target_TK):
    """Rows that a real dispatch sends to each rank, and those of the experts here."""
    own_TK = target_TK.chunk(ranks)[rank]
    x_TD = torch.zeros(len(own_TK), 4)
    plan = plan_from_ids(own_TK, placement.experts)
    choice = Choice(own_TK, torch.ones(own_TK.shape))
    first = rank * len(own_TK)
    received = AllToAll().dispatch(x_TD, choice, plan, placement, first)
    return received.handle.splits.send, int(received.plan.offsets_G1[-1])


def trained(rank, ranks, config, folder):
    Trainer(config, rank=rank, ranks=ranks, run_dir=folder).train_step()


def measured(rank, ranks, *args):
    from benchmarks import simulate as bench

    return bench.measure(torch.device("cpu"), *args)
