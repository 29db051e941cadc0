"""A rank that is gone is told from a bug, and comes out of every call that waits for it."""

import json

import pytest
import torch
import torch.distributed as dist

from moe_router.errors import WorkerLostError
from moe_router.training.checkpoint_files import latest_checkpoint
from moe_router.training.peers import is_peer_loss, peers_may_be_lost
from tests.gloo import run_ranks
from tests.training import work


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[../gloo/transport/tcp/pair.cc:553] Connection closed by peer [::1]"), True),
        (RuntimeError("[../gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting"), True),
        (RuntimeError("Gloo connectFullMesh failed with [..] Connection refused"), True),
        (dist.DistNetworkError("the client socket has timed out"), True),
        (dist.DistStoreError("wait timeout after 100ms"), True),
        (dist.DistBackendError("NCCL error: remote process exited"), True),
        (dist.DistBackendError("NCCL error: invalid usage"), False),
        (RuntimeError("Cannot use ReduceOp.PREMUL_SUM with Gloo"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (torch.OutOfMemoryError("CUDA out of memory"), False),
        (ValueError("Connection closed by peer"), False),
    ],
)
def test_only_a_failed_connection_is_a_lost_peer(error, lost):
    assert is_peer_loss(error) is lost
    wanted = WorkerLostError if lost else type(error)
    with pytest.raises(wanted) as raised, peers_may_be_lost("rank 1, step 7"):
        raise error
    if lost:
        assert str(raised.value).startswith("rank 1, step 7: another rank is gone or silent (")
        assert "\n" not in str(raised.value)
    else:
        assert raised.value is error


def test_a_loss_is_explained_once():
    inner, outer = peers_may_be_lost("inner"), peers_may_be_lost("outer")
    with pytest.raises(WorkerLostError, match=r"^inner: another rank"), outer, inner:
        raise RuntimeError("Connection reset by peer")


@pytest.mark.parametrize("dense", ["replicated", "fsdp"])
def test_a_rank_that_dies_is_a_lost_peer_to_the_others(dense, tmp_path):
    with pytest.raises(AssertionError, match="rank 1 died"):
        run_ranks(2, work.left_alone, work.tiny(dense=dense), str(tmp_path))
    said = json.loads((tmp_path / "said.json").read_text())
    assert [line.partition(": another rank is gone or silent (")[0] for line in said["lost"]] == [
        "rank 0, step 2",
        "rank 0, evaluation at step 1",
        f"rank 0, writing {tmp_path}/step_1",
    ]
    assert said["unchanged"] and said["step"] == 1
    assert latest_checkpoint(tmp_path) is None
