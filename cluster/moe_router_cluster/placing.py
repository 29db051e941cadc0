"""Room for the actors of a run: taken where it is free, waited for where a cluster may grow.

A placement group that does not fit is a demand, which an autoscaler answers with new nodes.
"""

import time
from collections.abc import Callable
from typing import Any

import ray
from ray.util.placement_group import (
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from moe_router.config import ClusterConfig
from moe_router.errors import ClusterError
from moe_router_cluster.progress import clock
from moe_router_cluster.resources import Resources, shortage, wanted

_ray: Any = ray  # half of its functions have no types
_AT_ONCE_S = 30.0  # placing takes milliseconds where there is room; a busy machine takes longer
_LOOK_S = 1.0  # a signal is handled between two looks


def place(cluster: ClusterConfig, device: str, say: Callable[[str], None]) -> Any:
    """A placement group with one bundle per actor, all of them reserved.

    Args:
        device: "cpu" or "cuda".
        say: told in one line what is waited for.

    Raises:
        ClusterError: there is no room; where nodes may join, not within cluster.wait_s.
    """
    lacks = shortage(cluster, device, _have())
    wait_s = 0.0 if cluster.address is None else cluster.wait_s
    if lacks is not None and not wait_s:
        raise ClusterError(lacks)
    bundle = {"CPU": cluster.cpus_per_actor} | ({"GPU": 1.0} if device == "cuda" else {})
    group = placement_group([bundle] * cluster.actors, strategy="PACK")
    try:
        if lacks is None and _placed(group, _AT_ONCE_S):
            return group
        if wait_s:
            say(_waiting(cluster, device, lacks is not None, wait_s))
            if _placed(group, wait_s):
                return group
        raise ClusterError(_refusal(cluster, device, wait_s))
    except BaseException:  # also an interrupt: who waits no longer asks no longer
        remove_placement_group(group)
        raise


def missing_bundles(group: Any, patience_s: float) -> set[int]:
    """Bundles of a placed group whose node was lost and which found no other within patience_s."""
    until = time.monotonic() + patience_s
    while (table := placement_group_table(group))["state"] != "CREATED":
        if time.monotonic() > until:
            alive = {node["NodeID"] for node in _ray.nodes() if node["Alive"]}
            at = table["bundles_to_node_id"]
            return {bundle for bundle, node in at.items() if node not in alive}
        time.sleep(_LOOK_S)
    return set()


def _placed(group: Any, patience_s: float) -> bool:
    until = time.monotonic() + patience_s
    while (left := until - time.monotonic()) > 0:
        if group.wait(min(left, _LOOK_S)):
            return True
    return False


def _waiting(cluster: ClusterConfig, device: str, lacks: bool, wait_s: float) -> str:
    auto = lacks and cluster.device == "auto" and device == "cpu"
    hint = "; to wait for GPUs set cluster.device=cuda" if auto else ""
    there = (
        f"the cluster has {_have()}" if lacks else f"of the cluster's {_have()}, {_free()} are free"
    )
    return f"waiting up to {clock(wait_s)} for {wanted(cluster, device)}: {there}{hint}"


def _refusal(cluster: ClusterConfig, device: str, wait_s: float) -> str:
    lacks = shortage(cluster, device, _have())
    if lacks is None:
        lacks = (
            f"cluster.actors={cluster.actors}: want {wanted(cluster, device)}, of the cluster's "
            f"{_have()}, {_free()} are free; end what else runs there, or lower cluster.actors or "
            "cluster.cpus_per_actor"
        )
    return lacks if not wait_s else f"{lacks}; waited cluster.wait_s={wait_s:g} for nodes to join"


def _have() -> Resources:
    return Resources.of(_ray.cluster_resources())


def _free() -> Resources:
    return Resources.of(_ray.available_resources())
