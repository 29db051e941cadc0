"""What ranks tell the gating service: whole routers, and the load of their own tokens."""

import pytest
import torch

from moe_router.gating import GatingService
from moe_router.placement import Placement
from moe_router.training.loop import Trainer
from moe_router.training.share import agreed
from tests.gloo import run_ranks
from tests.training import work


def shared(rank, ranks, config):
    """What each rank would publish after a step, its own load, and the load of all."""
    trainer = Trainer(config, rank=rank, ranks=ranks)
    record = trainer.train_step()
    trainer.evaluate()
    state = agreed(trainer, epoch=1, step=trainer.step)
    return state, trainer.own_load_LE, record.load_LE


def reported(state, *loads):
    """What the service says when each rank has told its load."""
    service = GatingService()
    service.publish(**state)
    for rank, load_LE in enumerate(loads):
        service.report_load(rank, 1, load_LE)
    assert service.load().alive == tuple(range(len(loads)))
    return service.load().load_LE


@pytest.mark.parametrize("dense", ["replicated", "fsdp"])
def test_routers_are_published_whole_and_loads_apart(dense):
    config = work.tiny(dense=dense)
    (one, load_LE, _), (other, other_LE, total_LE) = run_ranks(2, shared, config)
    assert one == other  # byte for byte
    ((alone, *_),) = run_ranks(1, shared, work.tiny())
    held = Placement.contiguous(config.model.moe.experts, 2)
    assert one["placements"] == [held] * len(one["routers"])
    assert len(one["routers"]) == len(alone["routers"]) >= 1
    for split, whole in zip(one["routers"], alone["routers"], strict=True):
        ours, theirs = split.build().state_dict(), whole.build().state_dict()
        for name, tensor in theirs.items():
            torch.testing.assert_close(ours[name], tensor, rtol=2e-3, atol=2e-5)
    assert not torch.equal(load_LE, other_LE)
    assert reported(one, load_LE, other_LE).tolist() == total_LE


def test_every_rank_of_several_sets_of_experts_is_heard():
    config = work.tiny(cluster={"actors": 2, "expert_ranks": 1})
    (one, load_LE, total_LE), (_, other_LE, _) = run_ranks(2, shared, config)
    every = tuple(range(config.model.moe.experts))
    assert one["placements"] == [Placement((every, every))] * len(one["routers"])
    assert reported(one, load_LE, other_LE).tolist() == total_LE
