"""A process among the ranks of a group: where it lives, and how it joins a generation."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import ray
import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from moe_router.errors import ClusterError, WorkerLostError
from moe_router.training.parallel import is_peer_loss
from moe_router_cluster.network import point_gloo_to

_ray: Any = ray  # half of its functions have no types


class Member:
    """Args:
    device: "cpu" or "cuda"; Ray shows a cuda actor its own GPU only.
    """

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        self._rank, self._ranks = 0, 1
        self._generation = 0
        self._store: TCPStore | None = None

    def ping(self) -> None:
        """Answers while another call runs: the process lives and is not frozen."""

    def home(self) -> tuple[str, int]:
        """The node's id and the process id: what it takes to end a frozen process."""
        return ray.get_runtime_context().get_node_id(), os.getpid()

    def device_name(self) -> str:
        """What it computes on: the GPU's name, or "cpu"."""
        cuda = self._device.type == "cuda"
        return torch.cuda.get_device_name(self._device) if cuda else self._device.type

    def sees(self, path: str) -> bool:
        """Whether this node sees a file that another one wrote."""
        return os.path.exists(path)

    def address(self, local: bool) -> str:
        """Where other ranks reach this one; local: all ranks are on this machine."""
        return "127.0.0.1" if local else str(_ray.util.get_node_ip_address())

    def host(self, address: str) -> int:
        """Open the store where the ranks of a new generation meet.

        Returns:
            The port, picked by the system.
        """
        self._store = TCPStore(address, 0, is_master=True, wait_for_workers=False)
        return int(self._store.port)

    def join(
        self, address: str, port: int, generation: int, rank: int, ranks: int, timeout_s: float
    ) -> None:
        """Form the process group of `generation` with the other ranks.

        Raises:
            WorkerLostError: a rank did not come within timeout_s.
        """
        self.leave()
        self._rank, self._ranks, self._generation = rank, ranks, generation
        if ranks == 1:
            return
        cuda = self._device.type == "cuda"
        point_gloo_to(address, port)
        with self._peers_may_be_lost():
            if rank != 0 or self._store is None:
                self._store = TCPStore(address, port, is_master=False, wait_for_workers=False)
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if cuda else "gloo",
                # a prefix per generation: a late rank of an old one finds nothing to join
                store=PrefixStore(f"generation{generation}", self._store),
                rank=rank,
                world_size=ranks,
                timeout=timedelta(seconds=timeout_s),
                device_id=torch.device("cuda", 0) if cuda else None,
            )

    def leave(self) -> None:
        """Forget the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def on_loss(self, reason: str) -> None:
        """Called when a rank is found missing, before WorkerLostError is raised."""

    @contextmanager
    def _peers_may_be_lost(self) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise ClusterError(
                f"rank {self._rank}: out of GPU memory; lower train.batch or data.seq_len, raise "
                "train.accumulation, or set train.activation_checkpointing=true"
            ) from error
        except WorkerLostError as error:
            self.on_loss(str(error))
            raise
        except RuntimeError as error:
            if not is_peer_loss(error):
                raise
            self.on_loss(str(error).splitlines()[0])
            raise WorkerLostError(f"rank {self._rank}: {str(error).splitlines()[0]}") from error
