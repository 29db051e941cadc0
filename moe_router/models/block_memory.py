"""What routed attention keeps beside the keys and values of a cache: the sum of the keys of each
block, a token at a time, and what the last block of each sequence has chosen."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moe_router_kernels import reference


@dataclass(slots=True)
class BlockMemory:
    """Attributes:
    size: tokens of a block.
    sum_BNJC: fp32, of the keys of each block of B sequences.
    target_BJK: int32, blocks of its sequence that the last block of each has chosen, -1 for none.
    weight_BJK: fp32, what each is weighed by.
    """

    size: int
    sum_BNJC: Tensor = field(default_factory=lambda: torch.zeros(0, 0, 0, 0))
    target_BJK: Tensor = field(default_factory=lambda: torch.zeros(0, 0, 0, dtype=torch.int32))
    weight_BJK: Tensor = field(default_factory=lambda: torch.zeros(0, 0, 0))

    def write(
        self, k_TJC: Tensor, sequence_T: Tensor, slot_T: Tensor, lengths: Sequence[int], top_k: int
    ) -> None:
        """Add keys to the sums of their blocks.

        Args:
            slot_T: the slot of each token in its sequence.
            lengths: of the sequences, the new tokens included.
            top_k: K, for the room of the choices.
        """
        k_TJC = reference.wide(k_TJC.detach())
        self._make_room(len(lengths), -(-max(lengths, default=0) // self.size), k_TJC, top_k)
        at = (sequence_T, slot_T // self.size)
        self.sum_BNJC = self.sum_BNJC.index_put(at, k_TJC, accumulate=True)

    def remember(self, row_R: Tensor, target_RJK: Tensor, weight_RJK: Tensor) -> None:
        """What the last blocks of the sequences row_R have chosen."""
        self.target_BJK = self.target_BJK.index_copy(0, row_R, target_RJK)
        self.weight_BJK = self.weight_BJK.index_copy(0, row_R, weight_RJK.detach())

    def keep(self, row_B: Tensor, rows: Sequence[int]) -> None:
        """Hold only these sequences, in that order."""
        self.sum_BNJC = rows_of(self.sum_BNJC, row_B, rows)
        self.target_BJK = rows_of(self.target_BJK, row_B, rows, empty=-1)
        self.weight_BJK = rows_of(self.weight_BJK, row_B, rows)

    def _make_room(self, sequences: int, blocks: int, like_TJC: Tensor, top_k: int) -> None:
        """For sequences that joined, and for blocks that begin."""
        _, J, C = like_TJC.shape
        held, wide = self.sum_BNJC.shape[:2]
        met = self.sum_BNJC.size(2) == J  # some step has met tokens
        if met and held == sequences and wide >= blocks:
            return
        wide = wide if wide >= blocks else max(blocks, 2 * wide)
        sums = like_TJC.new_zeros(sequences, wide, J, C)
        target = torch.full((sequences, J, top_k), -1, dtype=torch.int32, device=sums.device)
        weight = sums.new_zeros(sequences, J, top_k)
        if met:
            sums[:held, : self.sum_BNJC.size(1)] = self.sum_BNJC
            target[:held], weight[:held] = self.target_BJK, self.weight_BJK
        self.sum_BNJC, self.target_BJK, self.weight_BJK = sums, target, weight


def rows_of(x_B: Tensor, row_B: Tensor, rows: Sequence[int], empty: int = 0) -> Tensor:
    """What is remembered of these sequences; `empty` for those that no step has met since they
    joined. row_B and rows are the same, on the device and on the host."""
    missing = max(rows, default=-1) + 1 - x_B.size(0)
    if missing > 0:
        room = x_B.new_full((missing, *x_B.shape[1:]), empty, device=row_B.device)
        x_B = torch.cat([x_B.to(row_B.device), room])
    return x_B[row_B]
