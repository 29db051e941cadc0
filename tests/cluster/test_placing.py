"""Room for actors, without Ray: what is waited for, what is said, and what is given back."""

import pytest

from moe_router.config import ClusterConfig
from moe_router.errors import ClusterError
from moe_router_cluster import placing

HERE = ClusterConfig(actors=2)
ELSEWHERE = ClusterConfig(actors=2, address="10.0.0.1:6379", wait_s=0.05)


class Group:
    """A placement group that is placed at its n-th look, or never."""

    def __init__(self, looks: int | None) -> None:
        self.looks = looks
        self.bundles: list[dict[str, float]] = []

    def wait(self, seconds: float) -> bool:
        if self.looks is None:
            return False
        self.looks -= 1
        return self.looks <= 0


class World:
    """A cluster as Ray counts it, and what was asked of it."""

    def __init__(self, group: Group, have: dict[str, float], free: dict[str, float]) -> None:
        self.group, self.removed = group, []
        self.cluster_resources = lambda: have
        self.available_resources = lambda: free

    def placement_group(self, bundles, strategy):
        self.group.bundles = bundles
        return self.group


@pytest.fixture
def world(monkeypatch):
    def make(*, looks: int | None, have: dict[str, float], free: dict[str, float]) -> World:
        made = World(Group(looks), have, free)
        monkeypatch.setattr(placing, "_ray", made)
        monkeypatch.setattr(placing, "_AT_ONCE_S", 0.05)
        monkeypatch.setattr(placing, "placement_group", made.placement_group)
        monkeypatch.setattr(placing, "remove_placement_group", made.removed.append)
        return made

    return make


def test_free_room_is_taken_in_silence(world):
    made = world(looks=1, have={"CPU": 2, "GPU": 2}, free={"CPU": 2, "GPU": 2})
    assert placing.place(HERE, "cuda", pytest.fail) is made.group
    assert made.group.bundles == [{"CPU": 1.0, "GPU": 1.0}] * 2 and made.removed == []


def test_what_can_never_fit_here_is_not_asked_for(world):
    made = world(looks=1, have={"CPU": 1}, free={"CPU": 1})
    with pytest.raises(ClusterError, match="want 2 CPUs, the cluster has 1 CPU and 0 GPUs; set"):
        placing.place(HERE, "cpu", pytest.fail)
    assert made.group.bundles == [] and made.removed == []


def test_room_that_others_hold_is_given_up_with_a_reason(world):
    made = world(looks=None, have={"CPU": 4}, free={"CPU": 1})
    said = r"want 2 CPUs, of the cluster's 4 CPUs and 0 GPUs, 1 CPU and 0 GPUs are free; end what"
    with pytest.raises(ClusterError, match=said):
        placing.place(HERE, "cpu", pytest.fail)
    assert made.removed == [made.group]


def test_a_cluster_elsewhere_may_make_room(world):
    made = world(looks=3, have={"CPU": 1}, free={"CPU": 1})
    lines = []
    assert placing.place(ELSEWHERE, "cpu", lines.append) is made.group
    there = "the cluster has 1 CPU and 0 GPUs; to wait for GPUs set cluster.device=cuda"
    assert lines == [f"waiting up to 0:00 for 2 CPUs: {there}"]
    assert made.removed == []


def test_nobody_waits_longer_than_wait_s(world):
    made = world(looks=None, have={"CPU": 4, "GPU": 1}, free={"CPU": 4})
    lines = []
    with pytest.raises(ClusterError, match=r"; waited cluster\.wait_s=0\.05 for nodes to join$"):
        placing.place(ELSEWHERE, "cuda", lines.append)
    there = "the cluster has 4 CPUs and 1 GPU"
    assert lines == [f"waiting up to 0:00 for 2 CPUs and 2 GPUs: {there}"]
    assert made.removed == [made.group]


def test_who_stops_waiting_stops_asking(world, monkeypatch):
    made = world(looks=None, have={"CPU": 1}, free={"CPU": 1})

    def interrupted(seconds: float) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(made.group, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        placing.place(ELSEWHERE, "cpu", lambda line: None)
    assert made.removed == [made.group]
