"""The gating service as an actor: found by name, lost, frozen, and told anew."""

import asyncio
import os
import signal
import time
from dataclasses import replace

import pytest
import ray
import torch

from moe_router.config import ClusterConfig, RouterConfig
from moe_router.errors import ClusterError, StaleEpochError, UnknownRouterError
from moe_router.gating import GatingService
from moe_router.gating_records import RouterWeights
from moe_router.placement import Placement
from moe_router.routing import Router
from moe_router_cluster import gating_actor, session
from moe_router_cluster.gating_actor import (
    Agreement,
    RayGating,
    Reporter,
    find_gating,
    start_gating,
)
from tests.cluster.gating_calls import pid_of, until

pytestmark = pytest.mark.timeout(180)
E, D = 4, 8


@pytest.fixture(scope="module", autouse=True)
def ray_here():
    with session.ray_session(ClusterConfig()):
        yield


def test_a_process_of_one_cluster_does_not_run_there_what_asks_for_another():
    wanted = "this process is in the Ray cluster at .*; leave that by ray.shutdown"
    elsewhere = session.ray_session(ClusterConfig(address="10.0.0.1:1"))
    with pytest.raises(ClusterError, match=wanted), elsewhere:
        pytest.fail("it ran")


def agreed(epoch=1, ranks=2) -> dict:
    torch.manual_seed(0)
    own = Router(D, RouterConfig(experts=E, top_k=2))
    return {
        "epoch": epoch,
        "step": 0,
        "placements": [Placement.contiguous(E, ranks)],
        "capacity_factor": None,
        "routers": [RouterWeights.of("run", D, own, own.state_dict())],
    }


@pytest.fixture
def service():
    made = start_gating("alone", ClusterConfig())
    yield made
    ray.kill(made, no_restart=True)


def reported(reporter, load_LE, service):
    """Report until the service shows some load."""
    reporter.report(load_LE)
    load = ray.get(service.snapshot.remote()).load_LE
    return load if load.any() else None


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
        load = await gating.load()
        assert (load.epoch, load.alive, load.routers) == (1, (0, 1), ("run/0",))
        assert load.load_LE.tolist() == [[1.0] * E]
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


def test_a_service_that_starts_again_goes_on_with_what_it_kept(tmp_path):
    made = start_gating("kept", ClusterConfig(), tmp_path / "gating")
    try:
        ray.get(made.publish.remote(**agreed(7)))
        load_LE = torch.tensor([[4.0, 0.0, 0.0, 2.0]])
        ray.get(made.report_load.remote(1, 7, load_LE))
        os.kill(pid_of(made), signal.SIGKILL)

        def back():
            try:
                return ray.get(made.snapshot.remote())
            except ray.exceptions.RayActorError:
                return None

        held = until(back)  # nobody has told it anything
        assert (held.epoch, held.alive) == (7, (1,)) and torch.equal(held.load_LE, load_LE)
        assert held.routers == tuple(agreed(7)["routers"])
        ray.get(made.report_load.remote(0, 7, load_LE))
    finally:
        ray.kill(made, no_restart=True)


def test_epochs_go_on_above_those_that_a_run_kept(tiny):
    config, epochs = tiny(name="resumed"), []

    def publish(method, service, epoch, step):
        epochs.append(epoch)
        ray.get(service.publish.remote(**agreed(epoch)))

    for _ in range(2):  # two processes, one after the other
        agreement = Agreement(config, publish)
        agreement.agree(0)
        agreement.agree(5)
        agreement.close()
    assert epochs == [1, 2, 3, 4]


def test_a_model_without_experts_has_no_service(tiny):
    config = tiny(name="dense")
    dense = replace(config, model=replace(config.model, moe=None))
    Agreement(dense, lambda *args: pytest.fail("no rank has anything to share")).agree(0)
    with pytest.raises(ClusterError):
        find_gating("dense")
