"""What a benchmark gives to a contender, and what it gets back."""

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Layer:
    """One SwiGLU layer with its routing decided.

    Attributes:
        x_TD: bf16.
        ids_TK: int32, distinct in a token.
        weight_TK: fp32, sums to 1 in a token.
        gate_up: (E, 2 F, D) bf16, gate first.
        down: (E, D, F) bf16.
        grad_TD: bf16, of the layer's output.
    """

    x_TD: Tensor
    ids_TK: Tensor
    weight_TK: Tensor
    gate_up: Tensor
    down: Tensor
    grad_TD: Tensor

    @property
    def experts(self) -> int:
        return self.down.size(0)

    def leaves(self, train: bool) -> list[Tensor]:
        """x, weights of choices, gate_up and down, sharing memory with the layer's."""
        parts = self.x_TD, self.weight_TK, self.gate_up, self.down
        return [part.detach().requires_grad_(train) for part in parts]

    def interleaved(self) -> Tensor:
        """(E, 2 F, D): a row of gate, a row of up, and so on."""
        E, width, D = self.gate_up.shape
        return self.gate_up.view(E, 2, width // 2, D).transpose(1, 2).reshape(E, width, D)


@dataclass(frozen=True, slots=True)
class Call:
    """A layer ready to be timed.

    Attributes:
        run: gives (T, D).
        leaves: x, weights of choices, up weights, down weights, to differentiate by.
        interleaved: the up weights are in the order of `Layer.interleaved`.
        sorts: what depends on the ids alone is computed inside run: the peer has no other way.
    """

    run: Callable[[], Tensor]
    leaves: list[Tensor] = field(default_factory=list)
    interleaved: bool = False
    sorts: bool = False


Route = Callable[[], Tensor]


@dataclass(frozen=True, slots=True)
class Limited:
    """Routing as DeepSeek-V3 does it: sigmoid, bias, K of the experts in the best groups.

    Attributes:
        logits: (T, E) fp32.
        bias_E: fp32, added for the choice alone.
    """

    logits: Tensor
    bias_E: Tensor
    k: int
    groups: int
    top_groups: int


@dataclass(frozen=True, slots=True)
class Peer:
    """A contender; a string in place of a function says why there is none.

    Attributes:
        package: distribution whose version is recorded, if it has one.
        layer: (layer, train) -> Call.
        route: (logits fp32, K) -> a call that makes all that the peer's GEMMs need, and gives ids.
        permute: (logits, K, x) -> the same, and the rows in the order of the experts.
        route_groups: like route, for a `Limited` choice.
        graph: its forward pass is captured in a CUDA graph; else why not.
    """

    name: str
    package: str
    layer: Callable[[Layer, bool], Call] | str
    backward: bool | str = True
    route: Callable[[Tensor, int], Route] | str = "no call for routing alone"
    permute: Callable[[Tensor, int, Tensor], Route] | str = "no call for routing and permuting"
    route_groups: Callable[[Limited], Route] | str = "no call for routing limited to groups"
    graph: bool | str = True

    def version(self) -> str:
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return "unpacked, version unknown"


def silu_times(up_RF: Tensor) -> Tensor:
    """silu(gate) * up by torch, for peers without a fused activation."""
    gate, lift = up_RF.chunk(2, -1)
    return torch.nn.functional.silu(gate) * lift
