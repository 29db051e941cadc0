"""Replicas in the memory of peers: every rank killed, and the run goes on where it stood."""

import io
import json
from pathlib import Path

import pytest
import ray
from rich.console import Console

from moe_router.config import ClusterConfig
from moe_router_cluster import session
from moe_router_cluster.expert_shard import ExpertShard
from moe_router_cluster.replicas import ReplicaHolder, ReplicaStore, newest
from moe_router_cluster.shard_group import ShardGroup
from moe_router_cluster.train import train
from tests.cluster.weights import tensors

pytestmark = pytest.mark.timeout(240)


def test_a_holder_keeps_the_newest_whole_step_and_the_one_that_comes():
    holder = ReplicaHolder()
    for step in (5, 10, 15):
        holder.begin(step)
        holder.put(step, "a.safetensors", b"one")
        holder.put(step, "a.safetensors", b"two")
        if step < 15:
            holder.put(step, "state.json", b"{}")
    assert holder.whole() == [10]
    assert holder.sizes(10) == holder.sizes(15) == {"a.safetensors": 6}
    assert holder.sizes(5) == {}
    assert (holder.get(10, "a.safetensors", 3), holder.get(10, "a.safetensors", 6)) == (b"two", b"")
    holder.put(5, "a.safetensors", b"late")
    assert holder.sizes(5) == {}
    holder.begin(10)  # replayed: what was whole is none until it is whole again
    assert holder.whole() == []


def test_the_newest_is_by_number_and_the_first_of_equals():
    assert newest("/runs/a/step_9", "replica://step_10") == "replica://step_10"
    assert newest("/runs/a/step_10", "replica://step_10") == "/runs/a/step_10"
    assert newest("s3://b/step_5", None) == "s3://b/step_5"
    assert newest(None, None) is None


def test_what_a_killed_process_left_in_memory_goes_when_its_successor_comes(tmp_path, tiny):
    left = ReplicaStore([], tmp_path / "run", 0).partial(3)
    left.mkdir(parents=True)
    (left / "rank_0.safetensors").write_bytes(b"half")
    shard = ExpertShard(tiny(), str(tmp_path / "run"), "cpu", str(tmp_path))
    shard.keep_replicas([])
    assert not left.parent.exists()


@pytest.fixture(scope="module", autouse=True)
def ray_here():
    with session.ray_session(ClusterConfig()):
        yield


def run(config) -> str:
    out = io.StringIO()
    assert train(config, Console(file=out, width=200)), out.getvalue()
    return out.getvalue()


@pytest.fixture(scope="module")
def clean(tiny_of_module, ray_here):
    config = tiny_of_module(name="clean", checkpoint_every=12)
    run(config)
    return tensors(config)


def harmed(config, monkeypatch, harm) -> tuple[dict[str, bytes], dict]:
    """The weights of a run, harmed after its first replica, and its summary."""
    gather, done = ShardGroup.gather, []

    def after(self, refs):
        answers = gather(self, refs)
        if not done and self.latest_replica() == "replica://step_6":
            done.append(True)
            harm(self)
        return answers

    monkeypatch.setattr(ShardGroup, "gather", after)
    run(config)
    assert done
    folder = Path(config.run.dir) / config.run.name
    return tensors(config), json.loads((folder / "summary.json").read_text())


def everyone(group):
    for rank in range(group.ranks):
        group.kill(rank)


def test_every_rank_is_killed_and_no_checkpoint_was_ever_written(tiny, clean, monkeypatch):
    config = tiny(name="all", checkpoint_every=12, cluster={"replicate_every": 3})
    weights, facts = harmed(config, monkeypatch, everyone)
    assert weights == clean
    (loss,) = facts["recovery_log"]
    assert (loss["actors"], loss["from_step"]) == ([0, 1], 6)
    assert not list(Path("/dev/shm").glob("moe_router-*"))


@pytest.mark.slow
def test_a_holder_that_dies_costs_nothing_but_the_replica(tiny, clean, monkeypatch):
    config = tiny(name="holder", checkpoint_every=12, cluster={"replicate_every": 3})
    weights, facts = harmed(
        config, monkeypatch, lambda group: ray.kill(group._holders[0], no_restart=False)
    )
    assert weights == clean and facts["recoveries"] == 0
