"""Nodes that share a folder, and nodes that do not."""

from dataclasses import replace

import pytest

from moe_router.errors import ClusterError
from moe_router_cluster.expert_shard import ExpertShard
from moe_router_cluster.shared_folder import require_shared


@pytest.fixture
def ask(tiny, tmp_path):
    """Two ranks: one sees this node's disk, the other a disk of its own at the same place."""

    class Elsewhere(ExpertShard):
        def sees(self, path):
            return super().sees(path.replace(str(tmp_path), str(tmp_path / "other-disk")))

    shards = [kind(tiny(), str(tmp_path), "cpu", "/") for kind in (ExpertShard, Elsewhere)]
    return lambda method, *args: [getattr(shard, method)(*args) for shard in shards]


@pytest.mark.parametrize("key", ["run.dir", "run.storage"])
def test_a_folder_of_one_node_is_refused_with_the_reason(tiny, tmp_path, ask, key):
    config = tiny()
    storage = str(tmp_path / "kept") if key == "run.storage" else None
    config = replace(config, run=replace(config.run, storage=storage))
    with pytest.raises(ClusterError) as refused:
        require_shared(config, tmp_path / "runs" / "tiny", ["a", "b"], ask)
    said = str(refused.value)
    assert said.startswith(f"{key}={tmp_path}/") and "nodes of ranks 1 do not see" in said
    assert "set run.storage=s3://BUCKET/PREFIX" in said
    assert not list(tmp_path.rglob(".seen-*"))


def test_what_all_see_what_one_node_has_and_what_no_node_holds_are_taken(tiny, tmp_path, ask):
    config = tiny()
    run_dir = tmp_path / "runs" / "tiny"
    require_shared(config, run_dir, ["a", "a"], ask)
    require_shared(config, run_dir, ["a", "b"], lambda method, *args: ask(method, *args)[:1])
    remote = replace(config, run=replace(config.run, storage="s3://bucket/runs"))
    require_shared(remote, run_dir, ["a", "b"], ask)
