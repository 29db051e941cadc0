import os
from pathlib import Path

import pytest

import moe_router
from moe_router.config import ClusterConfig
from moe_router_cluster.resources import Resources, actor_environment, pick_device, shortage, wanted


def test_auto_is_cuda_only_where_every_actor_gets_a_gpu():
    cluster = ClusterConfig(actors=2)
    assert pick_device(cluster, Resources(8, 2)) == "cuda"
    assert pick_device(cluster, Resources(8, 1)) == "cpu"
    assert pick_device(ClusterConfig(actors=2, device="cpu"), Resources(8, 2)) == "cpu"


def test_auto_at_a_cluster_with_any_gpu_is_cuda():
    elsewhere = ClusterConfig(address="10.0.0.1:6379", actors=16)
    assert pick_device(elsewhere, Resources(96, 8)) == "cuda"
    assert pick_device(elsewhere, Resources(96, 0)) == "cpu"


@pytest.mark.parametrize(
    ("cluster", "device", "have", "message"),
    [
        (
            ClusterConfig(actors=2, device="cuda"),
            "cuda",
            Resources(8, 0),
            "cluster.device=cuda with cluster.actors=2: want 2 GPUs, the cluster has 8 CPUs and "
            "0 GPUs; set cluster.device=cpu",
        ),
        (
            ClusterConfig(actors=2, device="cuda"),
            "cuda",
            Resources(8, 1),
            "the cluster has 8 CPUs and 1 GPU; set cluster.actors=1 or cluster.device=cpu",
        ),
        (
            ClusterConfig(actors=4),
            "cpu",
            Resources(2, 0),
            "cluster.actors=4 of cluster.cpus_per_actor=1: want 4 CPUs, the cluster has 2 CPUs and "
            "0 GPUs; set cluster.actors=2 or cluster.cpus_per_actor=0.5",
        ),
    ],
)
def test_actors_that_could_never_be_placed_are_refused(cluster, device, have, message):
    assert message in shortage(cluster, device, have)


def test_actors_that_fit_lack_nothing():
    assert shortage(ClusterConfig(actors=4, cpus_per_actor=0.5), "cpu", Resources(2, 0)) is None
    assert shortage(ClusterConfig(actors=2, device="cuda"), "cuda", Resources(2, 2)) is None


def test_what_is_wanted_is_said_in_words():
    assert wanted(ClusterConfig(actors=3, cpus_per_actor=0.5), "cpu") == "1.5 CPUs"
    assert wanted(ClusterConfig(actors=1), "cuda") == "1 CPU and 1 GPU"


def test_actors_share_the_cores_and_find_our_packages():
    cores = len(os.sched_getaffinity(0))
    crowded = actor_environment(ClusterConfig(actors=cores + 1), "cpu")
    assert crowded["OMP_NUM_THREADS"] == "1"
    assert crowded["GLOO_SOCKET_IFNAME"] == "lo"
    assert actor_environment(ClusterConfig(actors=1), "cpu")["OMP_NUM_THREADS"] == str(cores)
    assert "OMP_NUM_THREADS" not in actor_environment(ClusterConfig(actors=1), "cuda")
    root = Path(moe_router.__file__).resolve().parent.parent
    if root.name != "site-packages":
        assert str(root) in crowded["PYTHONPATH"].split(os.pathsep)


def test_a_cluster_elsewhere_is_not_told_of_our_network():
    elsewhere = ClusterConfig(address="10.0.0.1:6379", actors=2, cpus_per_actor=3.0)
    variables = actor_environment(elsewhere, "cpu")
    assert "GLOO_SOCKET_IFNAME" not in variables
    assert variables["OMP_NUM_THREADS"] == "3"
