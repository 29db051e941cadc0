"""The actors of a run as one group: placed together, formed into one torch.distributed group, and
formed again under the next generation when some are lost."""

import math
import os
import signal
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import ray
from ray.util.placement_group import remove_placement_group
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

from moe_router.config import Config
from moe_router.errors import ClusterError
from moe_router_cluster.calls import Waiting
from moe_router_cluster.expert_shard import ExpertShardActor
from moe_router_cluster.placing import missing_bundles, place
from moe_router_cluster.replicas import ReplicaStore, place_holders
from moe_router_cluster.resources import Resources, actor_environment, pick_device
from moe_router_cluster.shared_folder import require_shared

_ray: Any = ray  # half of its functions have no types
BIRTH_S = 180.0  # a busy machine takes long to import torch, and then no ping is answered
LEAVE_S = 3.0  # to finish a checkpoint that is lost anyway; a new actor takes as long


def _kill(pid: int) -> None:
    """SIGKILL: the only thing that ends a frozen process."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # it is gone, which is what was wanted


class ShardGroup:
    """Args:
    config: of the run; cluster.actors is the number of ranks.
    run_dir: absolute path, the same on every node.
    bring: the method that brings a rank to a checkpoint: `restore` to train, `load` to serve.

    Attributes:
        generation: counts how often the group was formed.
        device: "cpu" or "cuda", what cluster.device comes to here.
    """

    def __init__(
        self, config: Config, run_dir: Path, bring: Literal["restore", "load"] = "restore"
    ) -> None:
        self.generation = 0
        self._bring = bring
        self.ranks = config.cluster.actors
        self.device = pick_device(config.cluster, Resources.of(_ray.cluster_resources()))
        self._config = config
        self._run_dir = run_dir
        self._placement: Any = None
        self._shards: list[Any] = []
        self._homes: list[tuple[str, int] | None] = []  # node id and pid of each rank
        self._bundles = list(range(self.ranks))  # of the placement group, one a rank
        self._holders: list[Any] = []  # of replicas
        self._here = ray.get_runtime_context().get_node_id()
        self._local = config.cluster.address is None

    def start(self, step_dir: Path | str | None, say: Callable[[str], None]) -> int:
        """Place the actors and form the first generation.

        Args:
            say: told in one line what is waited for, where nodes have to join first.

        Returns:
            Optimizer steps done: those of `step_dir`, 0 without it.

        Raises:
            ClusterError: the cluster has no room for the actors.
        """
        self._placement = place(self._config.cluster, self.device, say)
        self._shards = [self._spawn(bundle) for bundle in self._bundles]
        self._homes = [None] * self.ranks
        return self.form(step_dir)

    def form(self, step_dir: Path | str | None) -> int:
        """Form the next generation and bring every rank to `step_dir`, or to the seed's weights.

        Returns:
            Optimizer steps done.

        Raises:
            ActorsLost: some rank was lost meanwhile.
        """
        self.generation += 1
        timeout_s = self._config.cluster.timeout_s
        births = dict(enumerate(self.submit("home")))
        self._homes = self._wait(births, silence_s=max(BIRTH_S, timeout_s))
        nodes = [home[0] for home in self._homes if home is not None]
        if self._bring == "restore":  # who serves writes nothing
            require_shared(self._config, self._run_dir, [*nodes, self._here], self.ask)
        address = self.ask_first("address", self._local)
        port = self.ask_first("host", address)
        at = (address, port, self.generation)
        calls = [
            shard.join.remote(*at, rank, self.ranks, timeout_s)
            for rank, shard in enumerate(self._shards)
        ]
        self.gather(calls)
        if self._config.cluster.replicate_every and self._bring == "restore":
            self._hold(nodes)
        steps: list[int] = self.ask(self._bring, None if step_dir is None else str(step_dir))
        return steps[0]

    def latest_replica(self) -> str | None:
        """The newest step that is whole in the memory of the holders, for `form`."""
        return ReplicaStore(self._holders, self._run_dir).latest() if self._holders else None

    def submit(self, method: str, *args: Any) -> list[Any]:
        """Ask every rank without waiting."""
        return [getattr(shard, method).remote(*args) for shard in self._shards]

    def deal(self, method: str, each: Sequence[Any]) -> list[Any]:
        """Ask every rank with an argument of its own; the answers, rank by rank."""
        calls = [getattr(s, method).remote(x) for s, x in zip(self._shards, each, strict=True)]
        return self.gather(calls)

    def gather(self, refs: list[Any]) -> list[Any]:
        """The answers, rank by rank. Raises as `Waiting.answers`."""
        return self._wait(dict(enumerate(refs)))

    def ask(self, method: str, *args: Any) -> list[Any]:
        return self.gather(self.submit(method, *args))

    def ask_first(self, method: str, *args: Any) -> Any:
        """Ask rank 0 alone."""
        return self._wait({0: getattr(self._shards[0], method).remote(*args)})[0]

    def replace(self, lost: Iterable[int]) -> None:
        """Put new actors in the place of lost ones, and make the others leave the old generation.

        NCCL cannot leave a collective that a peer has died in, so on GPUs all ranks are replaced.
        """
        gone = set(range(self.ranks)) if self.device == "cuda" else set(lost)
        for rank in gone:
            self._end(rank)
        for rank in gone:
            self._shards[rank] = self._spawn(self._bundles[rank])
            self._homes[rank] = None
        spare_s = self._config.cluster.spare_s
        missing = missing_bundles(self._placement, spare_s)
        self._go_on_with_fewer({rank for rank in gone if self._bundles[rank] in missing})
        # an actor without a home has just been made, and is in no generation yet
        staying = {r: self._shards[r] for r, home in enumerate(self._homes) if home is not None}
        # a checkpoint that they were writing with the lost ones may hang
        self._wait({r: shard.leave.remote() for r, shard in staying.items()}, LEAVE_S)

    def _go_on_with_fewer(self, missing: set[int]) -> None:
        """As many ranks as there is room for and as divide the batch; experts are placed anew."""
        if not missing:
            return
        train, left = self._config.train, [r for r in range(self.ranks) if r not in missing]
        rows = train.batch // train.accumulation
        ranks = max((n for n in range(1, len(left) + 1) if rows % n == 0), default=0)
        if not ranks:
            raise ClusterError(
                f"no room for any actor within cluster.spare_s={self._config.cluster.spare_s:g}: "
                "want nodes, then the same command; it goes on from the newest checkpoint"
            )
        for rank in set(range(self.ranks)) - set(left[:ranks]):
            self._end(rank)
        self._shards = [self._shards[rank] for rank in left[:ranks]]
        self._homes = [self._homes[rank] for rank in left[:ranks]]
        self._bundles = [self._bundles[rank] for rank in left[:ranks]]
        self.ranks = ranks

    def _hold(self, nodes: list[str]) -> None:
        """Holders of replicas, made once; every generation is told of them."""
        if not self._holders:
            environment = actor_environment(self._config.cluster, "cpu")
            self._holders = place_holders(nodes, environment)
        self.ask("keep_replicas", self._holders)

    def kill(self, rank: int) -> None:
        """SIGKILL the process of `rank`, wherever it is, even if it is frozen."""
        home = self._homes[rank]
        if home is None:
            return  # it never said where it lives
        node, pid = home
        if node == self._here:
            _kill(pid)
            return
        # num_cpus=0: it must run on a node whose CPUs are all taken
        there = NodeAffinitySchedulingStrategy(node, soft=False)
        task = ray.remote(num_cpus=0)(_kill).options(scheduling_strategy=there)
        ray.wait([task.remote(pid)], timeout=self._config.cluster.timeout_s)

    def close(self) -> None:
        """End every actor and give their resources back."""
        for rank in range(len(self._shards)):
            self._end(rank)
        for holder in self._holders:
            ray.kill(holder, no_restart=True)
        self._shards, self._homes, self._holders = [], [], []
        if self._placement is not None:
            remove_placement_group(self._placement)
            self._placement = None

    def _wait(
        self,
        refs: dict[int, Any],
        patience_s: float = math.inf,
        silence_s: float | None = None,
    ) -> list[Any]:
        silence_s = self._config.cluster.timeout_s if silence_s is None else silence_s
        return Waiting(self._shards, refs, silence_s, patience_s).answers()

    def _spawn(self, bundle: int) -> Any:
        return ExpertShardActor.options(
            num_cpus=self._config.cluster.cpus_per_actor,
            num_gpus=1 if self.device == "cuda" else 0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                self._placement, placement_group_bundle_index=bundle
            ),
            runtime_env={"env_vars": actor_environment(self._config.cluster, self.device)},
        ).remote(self._config, str(self._run_dir), self.device, os.getcwd())

    def _end(self, rank: int) -> None:
        ray.kill(self._shards[rank], no_restart=True)
        self.kill(rank)  # ray.kill returns at once and leaves a frozen process behind
