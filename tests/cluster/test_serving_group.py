"""How ranks that serve are made anew, and why serving did not start. No Ray session."""

import asyncio
from types import SimpleNamespace

import pytest

from moe_router.errors import ClusterError, WorkerLostError
from moe_router.serving.requests import Work
from moe_router_cluster import serving_group
from moe_router_cluster.lost import ActorsLost
from moe_router_cluster.serve import _reason
from moe_router_cluster.serving_group import ServingGroup


class Shards:
    """In the place of ShardGroup; `form` fails as often as it is told."""

    def __init__(self, config, run_dir, bring):
        assert bring == "load"
        self.did, self.losses = [], []

    def replace(self, lost):
        self.did.append(("replace", sorted(lost)))

    def form(self, step_dir):
        self.did.append(("form", step_dir.name))
        if self.losses:
            raise self.losses.pop()

    def deal(self, method, each):
        return [[method, work] for work in each]


@pytest.fixture
def group(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(serving_group, "ShardGroup", Shards)
    return ServingGroup(tiny(cluster={"max_recoveries": 3}), tmp_path / "step_5")


def test_each_rank_gets_its_own_work(group):
    work = [Work(drop=(1,)), Work(drop=(2,))]
    assert asyncio.run(group.step(work)) == [["decode", work[0]], ["decode", work[1]]]
    assert group.ranks == 2


def test_the_lost_and_those_stuck_behind_them_are_replaced(group):
    asyncio.run(group.recover(ActorsLost([1], "actor 1 died", stuck=[0])))
    assert group._group.did == [("replace", [0, 1]), ("form", "step_5")]


def test_a_broken_connection_replaces_nobody(group):
    asyncio.run(group.recover(WorkerLostError("reset by peer")))
    assert group._group.did == [("replace", []), ("form", "step_5")]


def test_a_loss_while_forming_is_one_more(group):
    group._group.losses = [ActorsLost([0], "actor 0 died")]
    asyncio.run(group.recover(ActorsLost([1], "actor 1 died")))
    assert [what for what, _ in group._group.did] == ["replace", "form"] * 2
    assert group._group.did[2] == ("replace", [0])


def test_too_many_losses_in_an_hour_are_hopeless_and_older_ones_are_forgotten(group, monkeypatch):
    now = 0.0
    monkeypatch.setattr(serving_group, "time", SimpleNamespace(monotonic=lambda: now))
    lost = ActorsLost([1], "actor 1 died")
    for _ in range(5):  # one every half hour is bearable for ever
        asyncio.run(group.recover(lost))
        now += 1800
    asyncio.run(group.recover(lost))
    with pytest.raises(
        ClusterError,
        match=r"actor 1 died: loss number 4 within an hour, want at most 3 "
        r"\(cluster.max_recoveries\); see why actors die",
    ):
        asyncio.run(group.recover(lost))


@pytest.mark.parametrize(
    ("messages", "want"),
    [
        (
            ["", "Traceback\n  File x\nmoe_router.errors.ClusterError: want 2 GPUs\nmore"],
            "want 2 GPUs",
        ),
        (["x\nray::f() moe_router.errors.CheckpointError: gone", ""], "gone"),
        (["", "ValueError: odd"], "Ray Serve did not start the application: it failed"),
    ],
)
def test_why_serving_did_not_start_is_one_line(messages, want):
    deployments = {str(i): SimpleNamespace(message=m) for i, m in enumerate(messages)}
    app = SimpleNamespace(message="", deployments=deployments)
    status = SimpleNamespace(applications={"moe-router": app})
    assert _reason(status, RuntimeError("it failed\nin many words")) == want
