"""Models whose requests may ask for a compute budget; importable by the worker processes."""

import torch.distributed as dist

from moe_router.dispatch import AllToAll, Local
from moe_router.models import init_parameters
from moe_router.serving.decoder import Decoder
from moe_router.serving.requests import Request
from moe_router.training.build import new_model
from moe_router.training.calibrate import Shifts
from tests.serving.work import REQUESTS, TOKENIZER, drive
from tests.training.work import MOE, tiny

ROUTED = {
    "skip": {"kind": "skip", "every": 1, "first": 1},
    "halt": {"kind": "halt", "every": 1, "first": 0, "start": 0.3},
    "leap": {"kind": "leap", "every": 1, "first": 1, "start": -0.5},
}


def routed_model(kind, moe=False):
    """As initialised by one seed, for any number of ranks, with the config of its run; `kind` None
    is a model without a budget."""
    shape = {"layers": 3, "moe": MOE if moe else None, "routing": kind and ROUTED[kind]}
    config = tiny(model=shape)
    several = dist.is_initialized() and dist.get_world_size() > 1
    model = new_model(config, TOKENIZER.vocab, AllToAll() if several else Local())
    init_parameters(model, seed=3)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data *= 6
    return model.eval(), config


def with_shifts(shifts):
    """The requests of other tests, each with a shift of its own."""
    return [
        Request(one.id, one.prompt, one.sampling, shift=shift)
        for one, shift in zip(REQUESTS, shifts, strict=True)
    ]


def two_ranks(rank, ranks, kind, budgets):
    """Shifts that the ranks find together, and what requests of those shifts get: rank 1 has two
    of them, rank 0 the others."""
    model, config = routed_model(kind, moe=True)
    shifts = Shifts(model, config)
    shifts.prepare(0.5)
    found = [shifts.find(budget) for budget in budgets]
    first, second, third, fourth, fifth = with_shifts(found)
    admitted = [{0: [first], 3: [third, fourth]}, {2: [second, fifth]}][rank]
    return found, drive(Decoder(model, TOKENIZER.document_id), admitted, 40)
