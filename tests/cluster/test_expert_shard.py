"""The actor's class without Ray: one rank, and what it says when others are missing."""

import os

import pytest
import torch.distributed as dist

from moe_router.errors import ClusterError, WorkerLostError
from moe_router.training.checkpoint_files import latest_checkpoint
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
