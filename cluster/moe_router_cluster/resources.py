"""What a cluster has, whether a run fits into it, and what an actor's process needs to know."""

import os
import site
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import moe_router
import moe_router_cluster
import moe_router_kernels
from moe_router.config import ClusterConfig


@dataclass(frozen=True, slots=True)
class Resources:
    """CPUs and GPUs of a whole cluster, as Ray counts them."""

    cpus: float
    gpus: float

    @classmethod
    def of(cls, counted: Mapping[str, float]) -> "Resources":
        return cls(counted.get("CPU", 0.0), counted.get("GPU", 0.0))

    def __str__(self) -> str:
        return f"{_count(self.cpus, 'CPU')} and {_count(self.gpus, 'GPU')}"


def _count(number: float, what: str) -> str:
    return f"{number:g} {what}{'s' * (number != 1)}"


def pick_device(cluster: ClusterConfig, have: Resources) -> str:
    """auto is cuda where every actor gets a GPU of its own, else cpu.

    A cluster elsewhere that has any GPU is one for GPUs: too few are waited for.
    """
    if cluster.device == "auto":
        enough = cluster.actors if cluster.address is None else 1
        return "cuda" if have.gpus >= enough else "cpu"
    return cluster.device


def wanted(cluster: ClusterConfig, device: str) -> str:
    """What all actors take together, in words."""
    cpus = _count(cluster.actors * cluster.cpus_per_actor, "CPU")
    return f"{cpus} and {_count(cluster.actors, 'GPU')}" if device == "cuda" else cpus


def shortage(cluster: ClusterConfig, device: str, have: Resources) -> str | None:
    """Why the actors could not be placed even if nothing else ran, and the fix; None if they could.

    Args:
        device: "cpu" or "cuda".
        have: all that the cluster has, free or not.
    """
    actors, cpus = cluster.actors, cluster.cpus_per_actor
    if device == "cuda" and have.gpus < actors:
        fix = f"cluster.actors={have.gpus:g} or " if have.gpus >= 1 else ""
        return (
            f"cluster.device=cuda with cluster.actors={actors}: want {_count(actors, 'GPU')}, the "
            f"cluster has {have}; set {fix}cluster.device=cpu"
        )
    if have.cpus < actors * cpus:
        fits = int(have.cpus / cpus)
        fewer = f"cluster.actors={fits} or " if fits else ""
        share = int(100 * have.cpus / actors) / 100
        return (
            f"cluster.actors={actors} of cluster.cpus_per_actor={cpus:g}: want {actors * cpus:g} "
            f"CPUs, the cluster has {have}; set {fewer}cluster.cpus_per_actor={share:g}"
        )
    return None


def actor_environment(cluster: ClusterConfig, device: str) -> dict[str, str]:
    """Environment variables of an actor's process, set before it imports torch."""
    variables = {"PYTHONPATH": os.pathsep.join(_import_roots())}
    local = cluster.address is None
    if device == "cpu":
        cores = len(os.sched_getaffinity(0)) // cluster.actors if local else cluster.cpus_per_actor
        # more threads than cores make gloo's ranks wait for each other's threads
        variables["OMP_NUM_THREADS"] = str(max(1, int(cores)))
    else:
        # without it cuBLAS may sum in another order each time, and a replay would differ
        variables["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    if local:
        variables["GLOO_SOCKET_IFNAME"] = "lo"  # the host name may resolve to nothing, offline
    return variables


def _import_roots() -> list[str]:
    """Folders that make our packages importable: a checkout's, none where they are installed.

    site-packages must not be named: on PYTHONPATH it would come before the standard library.
    """
    installed = {Path(path).resolve() for path in site.getsitepackages()}
    installed |= {Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib")}
    packages = (moe_router, moe_router_kernels, moe_router_cluster)
    roots = [Path(str(package.__file__)).resolve().parent.parent for package in packages]
    already = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    ours = [str(root) for root in roots if root not in installed]
    return list(dict.fromkeys(ours + [path for path in already if path]))
