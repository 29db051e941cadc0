"""The gating service as a plain class: epochs, watchers, liveness and load."""

import dataclasses
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_router.errors import GatingError, StaleEpochError
from moe_router.gating import GatingService
from moe_router.placement import Placement
from tests.gating import D, E, publish, router, weights


@pytest.fixture
def clock():
    class Clock:
        now = 100.0

        def __call__(self):
            return self.now

    return Clock()


@pytest.fixture
def service(clock):
    made = GatingService(decay=0.5, heartbeat_timeout_s=10.0, clock=clock)
    publish(made)
    return made


# --- epochs ----------------------------------------------------------------------------------


def test_nothing_is_known_before_the_first_epoch():
    service = GatingService()
    assert service.snapshot().epoch == 0
    assert service.watch(0, 0.0) is None and service.watch(7, 0.0) is None
    with pytest.raises(StaleEpochError, match="rank 0: nothing is published yet"):
        service.heartbeat(0)


def test_an_epoch_is_never_taken_back(service):
    publish(service, epoch=7, step=40)
    again = publish(service, router(seed=5), epoch=7, step=50)  # the very epoch: known already
    assert (again.epoch, again.step) == (7, 40)
    with pytest.raises(StaleEpochError, match="publish epoch 6: want one above 7"):
        publish(service, epoch=6)
    assert service.snapshot().epoch == 7


def test_a_service_that_starts_again_goes_on_above_the_last_epoch(service, clock):
    publish(service, epoch=7)
    again = GatingService(clock=clock)
    with pytest.raises(StaleEpochError):
        again.report_load(0, 7, torch.ones(1, E))
    assert publish(again, epoch=8).epoch == 8
    again.report_load(0, 8, torch.ones(1, E))
    assert again.snapshot().load_LE.tolist() == [[1.0] * E]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"epoch": 0}, r"epoch, step: got \(0, 3\)"),
        ({"step": -1}, r"epoch, step: got \(2, -1\)"),
        ({"capacity_factor": 0.0}, "capacity_factor: got 0.0, want above 0"),
        ({"capacity_factor": float("nan")}, "capacity_factor: got nan"),
        ({"placements": [Placement.contiguous(3, 1)]}, "experts of run/0: got 4, want 3"),
        ({"placements": []}, "placements: got 0, want 1: routers"),
        (
            {
                "routers": [weights(router())] * 2,
                "placements": [Placement.contiguous(E, 2)] * 2,
            },
            "routers: got 2, want each model and layer once",
        ),
        (
            {
                "routers": [weights(router()), weights(router(layer=1))],
                "placements": [Placement.contiguous(E, 2), Placement.contiguous(E, 1)],
            },
            "ranks of run/1: got 1, want 2, as the others",
        ),
    ],
)
def test_what_cannot_be_shared_is_refused_and_changes_nothing(service, change, said):
    good = {
        "epoch": 2,
        "step": 3,
        "placements": [Placement.contiguous(E, 2)],
        "capacity_factor": None,
        "routers": [weights(router())],
    }
    with pytest.raises(GatingError, match=said):
        service.publish(**{**good, **change})
    assert service.snapshot().epoch == 1
    assert service.publish(**good).epoch == 2


def test_a_snapshot_does_not_change_and_changes_nothing(service):
    service.report_load(0, 1, torch.ones(1, E))
    held = service.snapshot()
    with pytest.raises(dataclasses.FrozenInstanceError):
        held.epoch = 5
    held.load_LE.fill_(9)
    before = service.route("run", 0, 1, torch.ones(2, D)).choice.weight_TK
    own = held.routers[0].build()
    with torch.no_grad():
        own.score.weight.zero_()
    assert torch.equal(before, service.route("run", 0, 1, torch.ones(2, D)).choice.weight_TK)
    assert service.snapshot().load_LE.tolist() == [[1.0] * E]
    publish(service, router(seed=9), epoch=2, step=4)
    service.heartbeat(1)
    assert (held.epoch, held.step, held.alive) == (1, 0, (0,))


def test_the_caller_may_change_what_it_published(service):
    own = router(seed=3)
    publish(service, own, epoch=2)
    before = service.route("run", 0, 2, torch.ones(2, D)).choice.weight_TK
    with torch.no_grad():
        own.score.weight.zero_()
    assert torch.equal(before, service.route("run", 0, 2, torch.ones(2, D)).choice.weight_TK)


# --- watch -----------------------------------------------------------------------------------


def test_watch_gives_the_present_one_at_once_or_nothing_in_time(service):
    assert service.watch(0, 0.0).epoch == 1
    assert service.watch(1, 0.01) is None
    assert service.watch(9, 0.0).epoch == 1  # of a service that was lost
    with pytest.raises(GatingError, match="timeout_s: got -1, want 0 s or more"):
        service.watch(1, -1)


def test_watch_wakes_every_watcher(service):
    seen, started = [], threading.Barrier(4)

    def wait():
        started.wait()
        seen.append(service.watch(1, 30.0).epoch)

    threads = [threading.Thread(target=wait) for _ in range(3)]
    for thread in threads:
        thread.start()
    started.wait()
    publish(service, epoch=2)
    for thread in threads:
        thread.join(20.0)
    assert seen == [2, 2, 2]


# --- liveness and load -----------------------------------------------------------------------


def test_a_silent_rank_is_not_alive(service, clock):
    assert service.heartbeat(1) == service.heartbeat(0) == 1
    assert service.snapshot().alive == (0, 1)
    clock.now += 6
    service.heartbeat(0)
    clock.now += 4  # rank 1 has been silent for the timeout, not for longer
    assert service.snapshot().alive == (0, 1)
    clock.now += 0.1
    assert service.snapshot().alive == (0,)
    service.heartbeat(1)
    assert service.snapshot().alive == (0, 1)
    assert service.snapshot().epoch == 1  # who is alive was not agreed on


@pytest.mark.parametrize("rank", [-1, 2])
def test_a_rank_that_is_none_is_refused(service, rank):
    with pytest.raises(GatingError, match=rf"rank: got {rank}, want 0..1 \(placement\)"):
        service.heartbeat(rank)
    with pytest.raises(GatingError):
        service.report_load(rank, 1, torch.ones(1, E))
    assert service.snapshot().alive == ()


def test_load_is_a_moving_average_of_the_ranks_that_live(service, clock):
    service.report_load(0, 1, torch.tensor([[8.0, 0.0, 0.0, 0.0]]))
    clock.now += 8
    service.report_load(1, 1, torch.tensor([[0, 4, 0, 0]], dtype=torch.int32))
    service.report_load(1, 1, torch.tensor([[0, 8, 2, 0]], dtype=torch.int32))
    assert service.snapshot().load_LE.tolist() == [[8.0, 6.0, 1.0, 0.0]]
    clock.now += 8
    assert service.snapshot().load_LE.tolist() == [[0.0, 6.0, 1.0, 0.0]]
    service.report_load(0, 1, torch.tensor([[2.0, 0.0, 0.0, 0.0]]))  # begins anew
    assert service.snapshot().load_LE.tolist() == [[2.0, 6.0, 1.0, 0.0]]


@settings(max_examples=30, deadline=None)
@given(st.permutations([rank for rank in range(3) for _ in range(3)]), st.integers(0, 2**31))
def test_load_does_not_depend_on_who_reports_first(order, seed):
    reports = torch.rand(3, 3, 1, E, generator=torch.Generator().manual_seed(seed))

    def after(ranks):
        service = GatingService(decay=0.7)
        publish(service, ranks=3)
        sent = [0, 0, 0]
        for rank in ranks:
            service.report_load(rank, 1, reports[rank, sent[rank]])
            sent[rank] += 1
        return service.snapshot().load_LE

    assert torch.equal(after(order), after(sorted(order)))


def test_a_stale_report_is_a_heartbeat_and_no_load(service):
    publish(service, epoch=2)
    for epoch in (1, 3):
        with pytest.raises(StaleEpochError, match=f"load of rank 1: epoch {epoch}, want 2"):
            service.report_load(1, epoch, torch.ones(1, E))
    held = service.snapshot()
    assert held.alive == (1,) and not held.load_LE.any()


@pytest.mark.parametrize(
    ("load_LE", "said"),
    [
        (torch.ones(2, E), r"got \(2, 4\), want layers x experts \(1, 4\)"),
        (torch.ones(E), r"got \(4,\), want"),
        (torch.full((1, E), torch.nan), "got NaN, infinite or negative, want counts"),
        (torch.full((1, E), torch.inf), "got NaN, infinite or negative, want counts"),
        (torch.full((1, E), -1), "got NaN, infinite or negative, want counts"),
    ],
)
def test_a_report_that_is_no_count_is_refused(service, load_LE, said):
    with pytest.raises(GatingError, match=f"load of rank 0: {said}"):
        service.report_load(0, 1, load_LE)
    assert not service.snapshot().load_LE.any()


def test_a_new_placement_forgets_ranks_that_are_gone(service):
    for rank in (0, 1):
        service.report_load(rank, 1, torch.ones(1, E))
    held = publish(service, epoch=2, ranks=1)
    assert held.alive == (0,) and held.load_LE.tolist() == [[1.0] * E]
    deeper = publish(service, router(), router(layer=1), epoch=3, ranks=1)
    assert deeper.load_LE.tolist() == [[0.0] * E] * 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"decay": 1.0}, "decay: got 1.0, want 0 <= decay < 1"),
        ({"heartbeat_timeout_s": 0.0}, "heartbeat_timeout_s: got 0.0, want above 0 s"),
    ],
)
def test_settings_out_of_range_are_refused(options, said):
    with pytest.raises(GatingError, match=said):
        GatingService(**options)
