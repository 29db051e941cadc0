"""The gating service as an actor: published by a run, found by name, and missed by nobody."""

import asyncio
import io
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import ray
import torch
from rich.console import Console
from safetensors import safe_open

from moe_router.config import ClusterConfig, RouterConfig
from moe_router.errors import ClusterError, StaleEpochError, UnknownRouterError
from moe_router.gating import GatingService
from moe_router.gating_records import RouterWeights
from moe_router.observability.csv_log import read_rows
from moe_router.placement import Placement
from moe_router.routing import Router
from moe_router_cluster import expert_shard, gating_actor, session
from moe_router_cluster import train as train_module
from moe_router_cluster.gating_actor import (
    Agreement,
    RayGating,
    Reporter,
    find_gating,
    start_gating,
)
from moe_router_cluster.shard_group import ShardGroup

pytestmark = pytest.mark.timeout(180)
E, D = 4, 8


@pytest.fixture(scope="module", autouse=True)
def ray_here():
    with session.ray_session(ClusterConfig()):
        yield


def agreed(epoch=1, ranks=2) -> dict:
    torch.manual_seed(0)
    own = Router(D, RouterConfig(experts=E, top_k=2))
    return {
        "epoch": epoch,
        "step": 0,
        "placement": Placement.contiguous(E, ranks),
        "capacity_factor": None,
        "routers": [RouterWeights.of("run", D, own, own.state_dict())],
    }


@pytest.fixture
def service():
    made = start_gating("alone", ClusterConfig())
    yield made
    ray.kill(made, no_restart=True)


def until(holds, seconds=60.0):
    """The first true value of `holds()`."""
    give_up_at = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < give_up_at, "waited in vain"
        time.sleep(0.05)
    return found


def pid_of(service) -> int:
    return ray.get(service.__ray_call__.remote(lambda self: os.getpid()))


def reported(reporter, load_LE, service):
    """Report until the service shows some load."""
    reporter.report(load_LE)
    load = ray.get(service.snapshot.remote()).load_LE
    return load if load.any() else None


# --- the actor alone -------------------------------------------------------------------------


def test_there_is_one_service_of_a_name(service):
    again = start_gating("alone", ClusterConfig())
    assert again._actor_id == service._actor_id == find_gating("alone")._actor_id
    with pytest.raises(ClusterError, match="gating:nobody: no such actor in this Ray cluster; it"):
        find_gating("nobody")


def test_ranks_report_and_a_service_that_starts_again_is_told_anew(service):
    first, other = Reporter(service, 0, 7, agreed(7)), Reporter(service, 1, 7)
    load_LE = torch.tensor([[4.0, 0.0, 0.0, 0.0]])
    until(lambda: reported(first, load_LE, service) is not None)
    other.report(load_LE)
    assert until(lambda: ray.get(service.snapshot.remote()).alive == (0, 1))

    os.kill(pid_of(service), signal.SIGKILL)
    began = time.monotonic()
    for _ in range(20):  # it is gone now: no report waits, none fails
        first.report(load_LE)
        other.report(load_LE)
    assert time.monotonic() - began < 2.0

    def heard_again():
        first.report(load_LE)
        other.report(load_LE)
        time.sleep(0.1)
        try:
            seen = ray.get(service.snapshot.remote())
        except ray.exceptions.RayActorError:
            return None
        return seen if seen.load_LE.any() else None

    seen = until(heard_again)
    assert (seen.epoch, seen.routers) == (7, tuple(agreed(7)["routers"]))


def test_a_frozen_service_holds_nobody_up(service):
    reporter = Reporter(service, 0, 1, agreed())
    until(lambda: reported(reporter, torch.ones(1, E), service) is not None)
    pid = pid_of(service)
    os.kill(pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        for _ in range(200):
            reporter.report(torch.ones(1, E))
        assert time.monotonic() - began < 2.0
    finally:
        os.kill(pid, signal.SIGCONT)


def test_the_adapter_answers_as_the_service_does(service):
    here = GatingService()
    here.publish(**agreed())
    ray.get(service.publish.remote(**agreed()))
    x_TD = torch.randn(5, D)

    async def ask():
        gating = RayGating("alone")
        found = await gating.watch(0, 1.0)
        assert await gating.watch(1, 0.0) is None
        await gating.report_load(1, 1, torch.ones(1, E))
        assert await gating.heartbeat(0) == 1
        with pytest.raises(StaleEpochError, match="epoch 3, want 1"):
            await gating.route("run", 0, 3, x_TD, None)
        with pytest.raises(UnknownRouterError, match="run/9"):
            await gating.route("run", 9, 1, x_TD, None)
        return found, await gating.route("run", 0, 1, x_TD, None)

    found, decision = asyncio.run(ask())
    want = here.route("run", 0, 1, x_TD)
    assert found.routers == here.snapshot().routers
    assert torch.equal(decision.choice.weight_TK, want.choice.weight_TK)
    assert torch.equal(decision.position_TK, want.position_TK)


def test_the_adapter_says_that_the_service_is_gone(monkeypatch):
    made = start_gating("mortal", ClusterConfig())
    gating = RayGating("mortal")
    ray.get(made.publish.remote(**agreed()))

    async def beat():
        return await gating.heartbeat(0)

    assert asyncio.run(beat()) == 1
    pid = pid_of(made)
    os.kill(pid, signal.SIGSTOP)
    monkeypatch.setattr(gating_actor, "_ANSWER_S", 0.2)
    with pytest.raises(ClusterError, match="gating:mortal: gone or frozen; ask again later"):
        asyncio.run(beat())
    os.kill(pid, signal.SIGCONT)
    ray.kill(made, no_restart=True)
    with pytest.raises(ClusterError, match="gating:mortal: "):
        asyncio.run(beat())


def test_epochs_go_on_above_those_of_a_service_that_is_there(tiny):
    config = tiny(name="alone")
    made = start_gating("alone", config.cluster)
    ray.get(made.publish.remote(**agreed(41)))
    asked = []
    agreement = Agreement(config, lambda *args: asked.append(args[2:]))
    agreement.agree(0)
    agreement.agree(5)
    assert asked == [(42, 0), (43, 5)]
    agreement.close()
    with pytest.raises(ClusterError):
        until(lambda: find_gating("alone") is None)


def test_a_model_without_experts_has_no_service(tiny):
    config = tiny(name="dense")
    dense = replace(config, model=replace(config.model, moe=None))
    Agreement(dense, lambda *args: pytest.fail("no rank has anything to share")).agree(0)
    with pytest.raises(ClusterError):
        find_gating("dense")


# --- in a run --------------------------------------------------------------------------------


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
    """Call `then(group)` once the n-th chunk of steps has been taken."""

    def when(count, then):
        taken = []
        gather, submit = ShardGroup.gather, ShardGroup.submit

        def noted(self, name, *args):
            taken.append(name)
            return submit(self, name, *args)

        def watched(self, refs):
            answers = gather(self, refs)
            if taken[-1] == "run" and taken.count("run") == count:
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
    seen = {}

    def snapshot():
        return ray.get(find_gating("shown").snapshot.remote())

    def wait(group):
        until(lambda: snapshot().epoch == 1)  # these few steps are faster than its start

    def look(group):
        # both ranks have sent a report by now; it may still be on its way
        choices = 2 * 4 * 32 * 2  # layers, rows, tokens of each, top_k
        until(lambda: snapshot().load_LE.sum() == choices)
        seen["snapshot"] = snapshot()

    after_run(1, wait)
    after_run(2, look)
    config = tiny(name="shown")
    assert run(config)
    assert result(config) == silent
    held = seen["snapshot"]
    assert held.alive == (0, 1) and held.placement == Placement(((0, 1), (2, 3)))
    assert [router.name for router in held.routers] == ["shown/0", "shown/1"]
    assert held.routers[0].build().config.top_k == 2
    with pytest.raises(ClusterError):  # the run is over, and the service with it
        until(lambda: find_gating("shown") is None)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP, None])
def test_training_goes_on_without_the_service_bit_for_bit(tiny, silent, after_run, how):
    def harm(group):
        service = find_gating("harmed")
        if how is None:
            ray.kill(service, no_restart=True)
        else:
            os.kill(pid_of(service), how)

    after_run(2, harm)
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
