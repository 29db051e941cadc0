"""What a gating service knows, on a disk: it outlives the process. Nothing is ever unpickled.

Two files, each put in place whole: `epoch.safetensors`, what was agreed, written when it changes;
`load.safetensors`, the averages by rank, small, written once a second at most. It covers no loss of
the disk: a service without its files begins empty, and is told anew.
"""

import dataclasses
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from moe_router.config import RouterConfig
from moe_router.errors import MoeRouterError
from moe_router.gating_records import RouterWeights, Snapshot
from moe_router.observability.files import write_atomic
from moe_router.placement import Placement

EPOCH, LOAD = "epoch.safetensors", "load.safetensors"
_VERSION = "1"
_T = TypeVar("_T")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """Attributes:
    agreed: without ranks and load.
    load: by rank, the (L, E) average of its reports.
    """

    agreed: Snapshot
    load: dict[int, Tensor]


class GatingFiles:
    """Args:
    folder: made when something is written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def write_epoch(self, agreed: Snapshot) -> None:
        """A disk that refuses is said in the log: the service goes on without."""
        routers = agreed.routers
        about = {
            "epoch": agreed.epoch,
            "step": agreed.step,
            "capacity_factor": agreed.capacity_factor,
            "placements": [placement.experts_of_rank for placement in agreed.placements],
            "routers": [_about(router) for router in routers],
        }
        weights = {str(i): _bytes(router.safetensors) for i, router in enumerate(routers)}
        self._put(EPOCH, weights, {"about": json.dumps(about)})

    def write_load(self, load: dict[int, Tensor]) -> None:
        self._put(LOAD, {str(rank): x for rank, x in load.items()}, {})

    def read(self) -> Kept | None:
        """None if no epoch is there. What cannot be read is said in the log, and left."""
        agreed = self._take(EPOCH, _agreed)
        if agreed is None:
            return None
        load = self._take(LOAD, lambda found, _: {int(rank): x for rank, x in found.items()}) or {}
        shape = agreed.load_LE.shape
        fits = {r: x for r, x in load.items() if r < agreed.ranks and x.shape == shape}
        return Kept(agreed, fits)

    def _take(
        self, name: str, make: Callable[[dict[str, Tensor], dict[str, str]], _T]
    ) -> _T | None:
        path = self._folder / name
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("version") != _VERSION:
                    raise ValueError(f"version {metadata.get('version')}, want {_VERSION}")
                return make({key: file.get_tensor(key) for key in file.keys()}, metadata)  # noqa: SIM118
        except (OSError, SafetensorError, MoeRouterError, KeyError, TypeError, ValueError) as error:
            _log.warning("%s cannot be read (%s); the gating service begins without", path, error)
            return None

    def _put(self, name: str, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        try:
            write_atomic(self._folder / name, save(tensors, {**metadata, "version": _VERSION}))
        except MoeRouterError as error:
            _log.warning("the gating service goes on without: %s", error)


def last_epoch(folder: Path) -> int:
    """That a service kept here; 0 if none did."""
    kept = GatingFiles(folder).read()
    return 0 if kept is None else kept.agreed.epoch


def _about(router: RouterWeights) -> dict[str, Any]:
    return {
        "model": router.model,
        "layer": router.layer,
        "dim": router.dim,
        "config": dataclasses.asdict(router.config),
    }


def _bytes(held: bytes | None) -> Tensor:
    assert held is not None  # a router without weights is never published
    return torch.frombuffer(bytearray(held), dtype=torch.uint8)


def _agreed(weights: dict[str, Tensor], metadata: dict[str, str]) -> Snapshot:
    about = json.loads(metadata["about"])
    placements = tuple(Placement(tuple(map(tuple, held))) for held in about["placements"])
    routers = tuple(
        RouterWeights(
            **{**router, "config": RouterConfig(**router["config"])},
            safetensors=weights[str(i)].numpy().tobytes(),
        )
        for i, router in enumerate(about["routers"])
    )
    empty_LE = torch.zeros(len(routers), placements[0].experts if placements else 0)
    return Snapshot(
        about["epoch"], about["step"], placements, about["capacity_factor"], routers, (), empty_LE
    )
