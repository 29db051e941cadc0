"""What stands in the place of a list of layers, where routing needs all of them at once."""

from collections.abc import Iterator
from typing import Any

from torch import nn


class Stacked(nn.Module):
    """Who loops over it, or over a slice of it, finds one layer: this. The layers keep
    their names, and their numbers.

    Args:
        layers: of a model of transformers.
    """

    def __init__(self, layers: nn.ModuleList) -> None:
        super().__init__()
        self._count = len(layers)
        for i, layer in enumerate(layers):
            self.add_module(str(i), layer)

    @property
    def layers(self) -> list[Any]:
        return [self.get_submodule(str(i)) for i in range(self._count)]

    def __iter__(self) -> Iterator[nn.Module]:
        yield self

    def __getitem__(self, which: int | slice) -> Any:
        return [self] if isinstance(which, slice) else self.layers[which]
