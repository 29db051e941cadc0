"""What the gating service hands out: immutable records that travel between processes."""

from dataclasses import dataclass, fields, replace
from typing import Self

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from moe_router.config import RouterConfig
from moe_router.errors import GatingError
from moe_router.placement import Placement
from moe_router.routing import Router


@dataclass(frozen=True, slots=True)
class RouterWeights:
    """One router, as the ranks share it.

    Attributes:
        model: name of the model; a run's is that of the run.
        layer: index of the layer in the model.
        dim: hidden size D of its tokens.
        config: how it decides.
        safetensors: its state in fp32; None where only the facts were asked for.
    """

    model: str
    layer: int
    dim: int
    config: RouterConfig
    safetensors: bytes | None

    @classmethod
    def of(cls, model: str, dim: int, router: Router, state: dict[str, Tensor]) -> Self:
        """The router of a layer.

        Args:
            state: of the router, whole tensors on any device.
        """
        known = (field.name for field in fields(RouterConfig))  # without what a MoEConfig adds
        config = RouterConfig(**{name: getattr(router.config, name) for name in known})
        held = {name: x.detach().cpu().float().contiguous() for name, x in state.items()}
        return cls(model, router.layer, dim, config, safetensors.torch.save(held))

    @property
    def key(self) -> tuple[str, int]:
        return self.model, self.layer

    @property
    def name(self) -> str:
        return f"{self.model}/{self.layer}"

    def limited(self, capacity_factor: float | None) -> Self:
        """The same router under another capacity."""
        return replace(self, config=replace(self.config, capacity_factor=capacity_factor))

    def build(self) -> Router:
        """The router itself, with its own copy of the weights, on the CPU.

        Raises:
            GatingError: there are no weights, or they are not those of such a router.
        """
        if self.safetensors is None:
            raise GatingError(f"router {self.name}: no weights; watch with_weights=true")
        with torch.device("meta"):  # to draw nothing from torch's generator
            router = Router(self.dim, self.config, layer=self.layer)
        router.to_empty(device="cpu").bias_E.zero_()
        try:
            router.load_state_dict(safetensors.torch.load(self.safetensors))
        except (SafetensorError, RuntimeError) as error:
            why = " ".join(str(error).split())
            raise GatingError(f"router {self.name}: its weights do not fit: {why}") from error
        return router


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """What ranks share during one epoch, and who is alive while it is handed out.

    Attributes:
        epoch: counts what was agreed: all but `alive` and `load_LE`.
        step: the checkpointed step from which it holds.
        placements: which rank holds which expert, for each router.
        capacity_factor: multiple of an expert's mean load; None is dropless.
        routers: in order of model and layer.
        alive: ranks heard from within the heartbeat timeout, ascending.
        load_LE: fp32, choices in one step: averages of the ranks that live, summed; row l is
            that of routers[l].
    """

    epoch: int
    step: int
    placements: tuple[Placement, ...]
    capacity_factor: float | None
    routers: tuple[RouterWeights, ...]
    alive: tuple[int, ...]
    load_LE: Tensor

    @property
    def ranks(self) -> int:
        return self.placements[0].ranks if self.placements else 0


@dataclass(frozen=True, slots=True, eq=False)
class Load:
    """What a `Snapshot` says of this moment; names as there.

    Attributes:
        routers: MODEL/LAYER of each row of load_LE.
    """

    epoch: int
    step: int
    alive: tuple[int, ...]
    routers: tuple[str, ...]
    load_LE: Tensor

    @property
    def skew_L(self) -> Tensor:
        """Load of the busiest expert over the mean; 1 is even, 0 is none at all."""
        mean_L = self.load_LE.mean(1)
        return (self.load_LE.amax(1) / mean_L).where(mean_L > 0, 0.0)


def need(holds: bool, where: str, got: object, want: str) -> None:
    """Refuse in one line what the gating service was asked or told."""
    if not holds:
        raise GatingError(f"{where}: got {got}, want {want}")
