"""What a model asks of a cache."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from moe_router.models.packing import Packing
from moe_router.models.rope import Turn


class CachedLayer(Protocol):
    """What attention needs of the cache of one layer."""

    def attend(
        self, q_THC: Tensor, k_TJC: Tensor, v_TJC: Tensor, turn: Turn, packing: Packing
    ) -> tuple[Tensor, Tensor]:
        """Append tokens to their sequences; each attends to all of its sequence up to itself.

        Args:
            q_THC, k_TJC: not yet turned.

        Returns:
            What came to the queries, (T, H, C), and the turned keys.
        """
        ...

    @property
    def length_B(self) -> Tensor: ...


class Cache(Protocol):
    """One of them a layer."""

    @property
    def layers(self) -> Sequence[CachedLayer]: ...


class Memory(Protocol):
    """What routed attention keeps beside the keys and values of a layer."""

    def keep(self, row_B: Tensor, rows: Sequence[int]) -> None:
        """Hold only the sequences `rows`, in that order; row_B is the same on the device."""
        ...
