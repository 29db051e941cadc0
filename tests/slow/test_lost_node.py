"""A node of a cluster dies and no other comes: fewer ranks go on, to the same weights."""

import io
import json
from pathlib import Path

import numpy as np
import psutil
import pytest
import ray
from ray.cluster_utils import Cluster
from rich.console import Console

from moe_router_cluster import session
from moe_router_cluster.shard_group import ShardGroup
from moe_router_cluster.train import train
from tests.cluster.conftest import make_tiny
from tests.cluster.weights import tensors

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture
def cluster():
    """A head without room for ranks, and two nodes with room for one each."""
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    yield nodes, [nodes.add_node(num_cpus=1) for _ in range(2)]
    ray.shutdown()
    nodes.shutdown()


def test_a_lost_node_leaves_fewer_ranks_and_the_same_weights(cluster, tmp_path, monkeypatch):
    nodes, (_, last) = cluster
    gather, submit, sent = ShardGroup.gather, ShardGroup.submit, []

    def noted(self, name, *args):
        sent.append(name)
        return submit(self, name, *args)

    def after(self, refs):
        answers = gather(self, refs)
        if sent.count("run") == 3 and "killed" not in sent:
            sent.append("killed")
            raylet = psutil.Process(last.all_processes["raylet"][0].process.pid)
            workers = raylet.children(recursive=True)
            nodes.remove_node(last, allow_graceful=False)
            # a run as short as this one may else be over before they notice
            assert not psutil.wait_procs(workers, timeout=60)[1]
        return answers

    room = {"address": nodes.address, "cpus_per_actor": 1.0, "spare_s": 5.0, "timeout_s": 20.0}

    def run(name) -> dict:
        config = make_tiny(tmp_path / "runs", name=name, cluster=room)
        out = io.StringIO()
        with session.ray_session(config.cluster):
            assert train(config, Console(file=out, width=200)), out.getvalue()
        folder = Path(config.run.dir) / config.run.name
        return config, json.loads((folder / "summary.json").read_text())

    clean, facts = run("clean")
    assert facts["recoveries"] == 0
    monkeypatch.setattr(ShardGroup, "submit", noted)
    monkeypatch.setattr(ShardGroup, "gather", after)
    hurt, facts = run("hurt")
    (loss,) = facts["recovery_log"]
    assert loss["fewer"] == 1
    want, got = tensors(clean), tensors(hurt)
    assert want.keys() == got.keys()
    for name, data in want.items():
        a, b = (np.frombuffer(each, np.float32) for each in (got[name], data))
        # rtol of the issue; atol: elements near 0 are differences of larger ones
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6, err_msg=name)
