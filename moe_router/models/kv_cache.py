"""Keys and values of the tokens so far. Each layer has its own storage and its own lengths, so
that a layer which some tokens skip holds fewer of them. For inference: nothing here has a gradient.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moe_router.errors import ConfigError
from moe_router.models.packing import Packing


@dataclass(slots=True)
class LayerCache:
    """Attributes:
    sequences: B.
    reserve: slots to hold from the start; more are added when they run out.
    lengths: slots in use; known to the host without a wait.
    length_B: int32, the same on the device.
    kv_2BSJC: keys, values: J heads of C channels in S slots of B sequences.
    """

    sequences: int
    reserve: int
    lengths: list[int] = field(init=False)
    length_B: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int32))
    kv_2BSJC: Tensor = field(default_factory=lambda: torch.zeros(0))

    def __post_init__(self) -> None:
        self.lengths = [0] * self.sequences

    @property
    def bound(self) -> int:
        """No sequence has more slots than this in use."""
        return max(self.lengths, default=0)

    def write(self, k_TJC: Tensor, v_TJC: Tensor, packing: Packing) -> Tensor:
        """Append tokens to their sequences.

        Returns:
            (T,) int64, the slot of each token in its sequence.
        """
        if packing.sequences != self.sequences:
            raise ConfigError(
                f"cache holds {self.sequences} sequences, offsets_B1 has {packing.sequences}: "
                f"want one for one; give a sequence without new tokens an empty range"
            )
        self.lengths = [held + new for held, new in zip(self.lengths, packing.lengths, strict=True)]
        self._make_room(k_TJC)
        sequence_T = packing.sequence_T
        slot_T = self.length_B[sequence_T] + packing.rank_T
        self.kv_2BSJC[0, sequence_T, slot_T] = k_TJC.detach()
        self.kv_2BSJC[1, sequence_T, slot_T] = v_TJC.detach()
        self.length_B = self.length_B + packing.offsets_B1.diff()
        return slot_T

    def read(self) -> tuple[Tensor, Tensor]:
        """(B, J, bound, C) keys and values; slots past a sequence's length are finite."""
        k, v = self.kv_2BSJC[:, :, : self.bound].transpose(2, 3).unbind(0)
        return k, v

    def keep(self, row_B: Tensor, rows: Sequence[int]) -> None:
        """Hold only the sequences `rows`, in that order; row_B is the same on the device."""
        self.sequences = len(rows)
        self.lengths = [self.lengths[row] for row in rows]
        if self._has_storage:
            # the copy is made anyway: let go of the slots that only a longer sequence used
            self.kv_2BSJC = self.kv_2BSJC[:, row_B, : max(self.bound, self.reserve)]
            self.length_B = self.length_B[row_B]

    def join(self, sequences: int) -> None:
        """Hold so many more sequences, empty ones, after those that are here."""
        self.sequences += sequences
        self.lengths += [0] * sequences
        if self._has_storage:
            _, _, *slot = self.kv_2BSJC.shape
            more = self.kv_2BSJC.new_zeros(2, sequences, *slot)
            self.kv_2BSJC = torch.cat([self.kv_2BSJC, more], 1)
            self.length_B = torch.cat([self.length_B, self.length_B.new_zeros(sequences)])

    @property
    def _has_storage(self) -> bool:
        return self.kv_2BSJC.dim() == 5

    def _make_room(self, like_TJC: Tensor) -> None:
        held = self.kv_2BSJC.size(2) if self._has_storage else 0
        if held >= self.bound and held > 0:
            return
        slots = max(self.bound, self.reserve, 2 * held)
        # zeros, not empty: a masked NaN would still poison a sum
        kv = like_TJC.new_zeros(2, self.sequences, slots, *like_TJC.shape[1:])
        if held:
            kv[:, :, :held] = self.kv_2BSJC
        else:
            self.length_B = self.length_B.new_zeros(self.sequences, device=like_TJC.device)
        self.kv_2BSJC = kv


class KVCache:
    """One `LayerCache` per layer.

    Args:
        layers: of the model.
        sequences: B, fixed but for `keep` and `join`.
        reserve: tokens per sequence to hold room for from the start.
    """

    def __init__(self, layers: int, sequences: int, reserve: int = 0) -> None:
        self.layers = [LayerCache(sequences, reserve) for _ in range(layers)]

    def keep(self, row_B: Tensor) -> None:
        """Hold only the sequences `row_B` (int64, on the cache's device), in that order."""
        rows: list[int] = row_B.tolist()
        for layer in self.layers:
            layer.keep(row_B, rows)

    def join(self, sequences: int) -> None:
        """Hold so many more sequences, empty ones, after those that are here."""
        for layer in self.layers:
            layer.join(sequences)
