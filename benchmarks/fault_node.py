"""A Ray cluster of several nodes on this machine, one of which may die."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import ray
from ray.cluster_utils import Cluster

from moe_router.config import Config
from moe_router_cluster.session import ray_session

_ray: Any = ray  # half of its functions have no types


@contextmanager
def nodes(ranks: int, config: Config) -> Iterator[Config]:
    """A node for each rank, and one more for who is lost; the config, to be run there."""
    there: Any = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})  # no types
    try:
        for _ in range(ranks + 1):
            there.add_node(num_cpus=1)
        cluster = replace(config.cluster, address=there.address, cpus_per_actor=1.0)
        with ray_session(cluster):
            yield replace(config, cluster=cluster)
    finally:
        _ray.shutdown()
        there.shutdown()
