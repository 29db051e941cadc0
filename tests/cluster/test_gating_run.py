"""A run and its gating service: what it publishes, and that nothing of it touches the weights."""

import asyncio
import io
import os
import signal
import time
from pathlib import Path

import grpc
import pytest
import ray
import torch
from rich.console import Console
from safetensors import safe_open

from moe_router.config import ClusterConfig
from moe_router.errors import ClusterError
from moe_router.gating import GatingService
from moe_router.observability.csv_log import read_rows
from moe_router.placement import Placement
from moe_router.serving import router_pb2 as pb
from moe_router.serving.grpc_router import router_adder
from moe_router.serving.grpc_server import serve_grpc
from moe_router.serving.matrices import from_matrix, to_matrix
from moe_router.serving.router_messages import snapshot_of
from moe_router.serving.router_pb2_grpc import RouterStub
from moe_router_cluster import expert_shard, session
from moe_router_cluster import train as train_module
from moe_router_cluster.gating_actor import Agreement, RayGating, find_gating
from moe_router_cluster.shard_group import ShardGroup
from tests.cluster.gating_calls import pid_of, until

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module", autouse=True)
def ray_here():
    with session.ray_session(ClusterConfig()):
        yield


def run(config, **options):
    out = io.StringIO()
    return train_module.train(config, Console(file=out, width=200), **options)


def result(config) -> tuple[dict[str, bytes], list[tuple[str, str]]]:
    """Every tensor of the last checkpoint, byte for byte, and the losses."""
    folder = Path(config.run.dir) / config.run.name
    found = {}
    for path in sorted((folder / f"step_{config.train.steps}").glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {key: file.get_tensor(key).numpy().tobytes() for key in file.keys()}  # noqa: SIM118
    assert any("router" in key for key in found)
    return found, [(row["step"], row["loss"]) for row in read_rows(folder / "metrics.csv")]


@pytest.fixture
def after_run(monkeypatch):
    """Call `then(group)` after the n-th call of `run`, for each n of `counts`."""

    def when(counts, then):
        taken = []
        gather, submit = ShardGroup.gather, ShardGroup.submit

        def noted(self, name, *args):
            taken.append(name)
            return submit(self, name, *args)

        def watched(self, refs):
            answers = gather(self, refs)
            if taken[-1] == "run" and taken.count("run") in counts:
                taken.append("done")
                then(self)
            return answers

        monkeypatch.setattr(ShardGroup, "submit", noted)
        monkeypatch.setattr(ShardGroup, "gather", watched)

    return when


@pytest.fixture(scope="module")
def silent(tiny_of_module, ray_here):
    """A run that tells nobody anything: what the others must equal bit for bit."""
    config = tiny_of_module(name="silent")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Agreement, "agree", lambda self, step: None)
        assert run(config)
    return result(config)


def test_a_run_publishes_its_routers_and_its_load(tiny, silent, after_run):
    seen = []

    def look(group):
        until(lambda: ray.get(find_gating("shown").snapshot.remote()).epoch == 1)
        time.sleep(0.1)  # for reports that are on their way
        seen.append(ray.get(find_gating("shown").snapshot.remote()))

    after_run(range(1, 12), look)
    config = tiny(name="shown", checkpoint_every=12, eval_every=1)  # one step a call, one epoch
    assert run(config)
    assert result(config) == silent
    held = seen[-1]
    choices = 2 * 4 * 32 * 2  # layers, rows, tokens of each, top_k
    assert float(held.load_LE.sum()) == pytest.approx(choices)
    assert held.alive == (0, 1) and held.placements == (Placement(((0, 1), (2, 3))),) * 2
    assert [router.name for router in held.routers] == ["shown/0", "shown/1"]
    assert held.routers[0].build().config.top_k == 2
    with pytest.raises(ClusterError):  # the run is over, and the service with it
        until(lambda: find_gating("shown") is None)


@pytest.mark.slow
def test_every_set_of_experts_reports_and_a_lost_rank_of_the_second_comes_back(tiny, after_run):
    seen = []
    after_run(range(1, 20), lambda _: seen.append(ray.get(find_gating("sets").snapshot.remote())))
    config = tiny(name="sets", checkpoint_every=4, eval_every=1, cluster={"expert_ranks": 1})
    assert run(config, kill="1@6")
    whole = [held for held in seen if held.step == 8 and held.alive == (0, 1)]
    assert whole and whole[-1].placements == (Placement(((0, 1, 2, 3),) * 2),) * 2
    assert float(whole[-1].load_LE.sum()) == pytest.approx(2 * 4 * 32 * 2)  # as of one set


def test_a_client_routes_by_the_model_that_trains(tiny, after_run):
    x_TD = torch.randn(6, 32)

    async def ask():
        server, port = await serve_grpc([router_adder(RayGating("routed"))])
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                stub = RouterStub(channel)
                stream = stub.WatchSnapshot(pb.WatchSnapshotRequest(with_weights=True))
                held = snapshot_of(await stream.read())
                request = pb.RouteRequest(
                    model="routed", layer=1, epoch=held.epoch, x_TD=to_matrix(x_TD)
                )
                return held, await stub.Route(request)
        finally:
            await server.stop(None)

    seen = []
    after_run([1], lambda group: seen.append(asyncio.run(ask())))
    assert run(tiny(name="routed"))
    ((held, reply),) = seen
    here = GatingService()
    here.publish(
        epoch=1, step=0, placements=held.placements, capacity_factor=None, routers=held.routers
    )
    want = here.route("routed", 1, 1, x_TD)
    assert (held.epoch, held.step) == (1, 0)
    assert torch.equal(from_matrix(reply.weight_TK, "weight"), want.choice.weight_TK)
    assert torch.equal(from_matrix(reply.position_TK, "position"), want.position_TK)


# killed by a signal: tests/cluster/test_fault_rows.py
@pytest.mark.parametrize("how", [signal.SIGSTOP, None])
def test_training_goes_on_without_the_service_bit_for_bit(tiny, silent, after_run, how):
    def harm(group):
        service = find_gating("harmed")
        if how is None:
            ray.kill(service, no_restart=True)
        else:
            os.kill(pid_of(service), how)

    after_run([2], harm)
    config = tiny(name="harmed")
    assert run(config)
    assert result(config) == silent


def test_a_killed_rank_begins_a_new_epoch(tiny, silent):
    config = tiny(name="epochs")
    epochs = []
    with pytest.MonkeyPatch.context() as patch:
        agree = Agreement.agree

        def noted(self, step):
            agree(self, step)
            epochs.append((self._epoch, step))

        patch.setattr(Agreement, "agree", noted)
        assert run(config, kill="1@7")
    assert result(config) == silent
    assert epochs == [(1, 0), (2, 5), (3, 5), (4, 10), (5, 12)]


# torch says that there is no process group, which is what one rank wants
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_the_published_router_is_the_models(tiny, tmp_path, monkeypatch):
    sent = []
    monkeypatch.setattr(expert_shard, "Reporter", lambda *args: sent.append(args))
    shard = expert_shard.ExpertShard(tiny(actors=1), str(tmp_path), "cpu", os.getcwd())
    shard.restore(None)
    shard.run(1)
    shard.share("handle", 3, 1)
    ((_, rank, epoch, state),) = sent
    assert (rank, epoch, state["epoch"], state["step"]) == (0, 3, 3, 1)
    service = GatingService()
    service.publish(**state)
    model = shard._trainer.model
    for block, held in zip(model.blocks, service.snapshot().routers, strict=True):
        assert torch.equal(held.build().score.weight, block.moe.router.score.weight)
    assert shard._trainer.own_load_LE.sum(1).tolist() == [4 * 32 * 2] * 2
    shard._reporter = None
    shard.leave()
