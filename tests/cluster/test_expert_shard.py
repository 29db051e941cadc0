"""The actor's class without Ray: one rank, and what it says when others are missing."""

import os
from dataclasses import replace

import pytest
import torch.distributed as dist

from moe_router.config import RoutingConfig
from moe_router.errors import ClusterError, WorkerLostError
from moe_router.training.calibrate import FAR, calibrate
from moe_router.training.checkpoint_files import latest_checkpoint
from moe_router.training.data import load_dataset
from moe_router.training.inference import load_for_inference
from moe_router_cluster.expert_shard import ExpertShard


@pytest.fixture
def shard(tiny, tmp_path):
    made = []

    def make() -> ExpertShard:
        made.append(ExpertShard(tiny(actors=1), str(tmp_path), "cpu", os.getcwd()))
        return made[-1]

    yield make
    for one in made:
        one.leave()


# torch says that there is no process group, which is what one rank wants
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_one_rank_trains_saves_and_comes_back(shard, tmp_path):
    first = shard()
    first.join("127.0.0.1", 0, generation=1, rank=0, ranks=1, timeout_s=5.0)
    assert first.restore(None) == 0
    assert [record.step for record in first.run(2)] == [1, 2]
    first.save(True)
    (third,) = first.run(1)
    again = shard()
    assert again.restore(str(latest_checkpoint(tmp_path))) == 2
    (replayed,) = again.run(1)
    assert (replayed.step, replayed.loss) == (3, third.loss)
    assert again.evaluate().step == 3


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_one_rank_that_serves_finds_the_shift_of_a_compute_budget(tiny, tmp_path):
    config = tiny(actors=1)
    routed = replace(config.model, routing=RoutingConfig(kind="skip", every=1, first=1))
    config = replace(config, model=routed)
    shard = ExpertShard(config, str(tmp_path), "cpu", os.getcwd())
    with pytest.raises(ClusterError, match="rank 0: nothing to serve yet; call load first"):
        shard.prepare_shifts(0.5)
    shard.join("127.0.0.1", 0, generation=1, rank=0, ranks=1, timeout_s=5.0)
    shard.restore(None)
    shard.run(2)
    shard.save(True)
    step = latest_checkpoint(tmp_path)
    shard.leave()
    assert shard.load(str(step)) == 2
    shard.prepare_shifts(0.5)
    found = [shard.find_shift(budget) for budget in (0.0, 0.5, 1.0)]
    model, config, _ = load_for_inference(step)
    calibrate(model, load_dataset(config.data), config, 0.5)
    assert found == [-FAR, model.blocks[1].skip.shift, FAR] and abs(found[1]) < FAR


def test_a_rank_without_a_trainer_says_what_is_missing(shard):
    with pytest.raises(ClusterError, match="rank 0: no trainer yet; call restore first"):
        shard().run(1)


def test_a_peer_that_never_comes_is_a_lost_peer(shard):
    alone = shard()
    port = alone.host("127.0.0.1")
    with pytest.raises(WorkerLostError, match="rank 0: ") as lost:
        alone.join("127.0.0.1", port, generation=1, rank=0, ranks=2, timeout_s=0.5)
    assert "\n" not in str(lost.value)
    assert not dist.is_initialized()
