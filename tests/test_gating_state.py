"""A gating service that is started again knows what the one before it knew."""

import threading
from dataclasses import replace

import pytest
import torch

from moe_router.errors import StaleEpochError
from moe_router.gating import GatingService
from moe_router.gating_state import EPOCH, LOAD, last_epoch
from moe_router.placement import Placement
from tests.gating import CONFIG, D, E, publish, router

COPIES = Placement(((0, 1, 2), (3, 0, 1)))


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def begin(tmp_path, clock):
    """A service in the place of the one before."""
    return lambda: GatingService(decay=0.5, clock=clock, folder=tmp_path / "gating")


def facts(service):
    held = service.snapshot()
    return held.epoch, held.step, held.placements, held.capacity_factor, held.routers


def test_epoch_placement_and_routers_outlive_it(begin, tmp_path):
    first = begin()
    assert first.snapshot().epoch == last_epoch(tmp_path / "gating") == 0
    publish(first, epoch=7, step=40)
    routers = router(replace(CONFIG, bias_rate=0.1)), router(layer=3, seed=1)
    publish(first, *routers, epoch=8, step=50, placement=COPIES, factor=1.5)
    again = begin()
    assert facts(again) == facts(first)
    assert facts(again)[:4] == (8, 50, (COPIES,) * 2, 1.5)
    assert last_epoch(tmp_path / "gating") == 8
    x_TD = torch.randn(9, D)
    for layer in (0, 3):
        ours, theirs = (each.route("run", layer, 8, x_TD) for each in (again, first))
        assert torch.equal(ours.choice.weight_TK, theirs.choice.weight_TK)
        assert torch.equal(ours.position_TK, theirs.position_TK)
    with pytest.raises(StaleEpochError, match="publish epoch 7: want one above 8"):
        publish(again, epoch=7)
    assert publish(again, epoch=9).epoch == 9


def test_averages_go_on_where_they_were(begin, clock):
    first = begin()
    publish(first, epoch=3)
    for rank, load in ((0, [8.0, 0, 0, 0]), (1, [0, 4.0, 0, 0]), (1, [0, 8.0, 2, 0])):
        clock.now += 2
        first.report_load(rank, 3, torch.tensor([load]))
    again = begin()
    held = again.snapshot()
    assert held.load_LE.tolist() == [[8.0, 6.0, 1.0, 0.0]] and held.alive == (0, 1)
    again.report_load(1, 3, torch.tensor([[0.0, 8.0, 2, 0]]))  # of the epoch that was kept
    assert again.snapshot().load_LE.tolist() == [[8.0, 7.0, 1.5, 0.0]]
    clock.now += 10.1  # rank 0 was heard from when the service started, and not since
    again.heartbeat(1)
    assert again.snapshot().alive == (1,)


def test_load_is_written_once_a_second_at_most(begin, clock, tmp_path):
    service = begin()
    publish(service)
    file = tmp_path / "gating" / LOAD
    service.report_load(0, 1, torch.ones(1, E))
    first = file.read_bytes()
    clock.now += 0.9
    service.report_load(0, 1, 5 * torch.ones(1, E))
    assert file.read_bytes() == first
    clock.now += 0.2
    service.report_load(0, 1, 5 * torch.ones(1, E))
    assert begin().snapshot().load_LE.tolist() == [[4.0] * E]


def test_what_no_longer_fits_is_not_taken_back(begin):
    first = begin()
    publish(first, router(), router(layer=1), epoch=1)
    first.report_load(1, 1, torch.ones(2, E))
    publish(first, epoch=2, ranks=1)  # one rank, one layer
    held = begin().snapshot()
    assert not held.load_LE.any() and held.alive == ()


@pytest.mark.parametrize("name", [EPOCH, LOAD])
@pytest.mark.parametrize("how", ["truncated", "foreign", "empty"])
def test_a_damaged_file_is_said_and_replaced(begin, clock, tmp_path, caplog, name, how):
    first = begin()
    publish(first, epoch=4)
    first.report_load(0, 4, torch.ones(1, E))
    path = tmp_path / "gating" / name
    held = path.read_bytes()
    path.write_bytes({"truncated": held[:-3], "foreign": b"\x80\x04K\x01.", "empty": b""}[how])
    again = begin()
    assert f"{name} cannot be read" in caplog.text
    assert again.snapshot().epoch == (0 if name == EPOCH else 4)
    assert not again.snapshot().load_LE.any()
    publish(again, epoch=5)
    again.report_load(0, 5, torch.ones(1, E))
    whole = begin().snapshot()
    assert whole.epoch == 5 and whole.load_LE.tolist() == [[1.0] * E]


def test_a_disk_that_refuses_stops_nothing(tmp_path, caplog):
    (tmp_path / "gating").write_text("a file, where a folder should be")
    service = GatingService(folder=tmp_path / "gating")
    publish(service, epoch=2)
    service.report_load(0, 2, torch.ones(1, E))
    assert service.snapshot().load_LE.any()
    assert "the gating service goes on without" in caplog.text


def test_what_is_on_the_disk_is_the_newest_whoever_was_last(begin):
    service = begin()
    start = threading.Barrier(4)

    def some(epochs):
        start.wait()
        for epoch in epochs:
            try:
                publish(service, epoch=epoch)
            except StaleEpochError:
                continue

    threads = [threading.Thread(target=some, args=(range(i, 41, 4),)) for i in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert service.snapshot().epoch == 40 and facts(begin()) == facts(service)
