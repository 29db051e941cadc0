"""What one rank computes in one micro-step, whatever kind of data it comes from."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """One rank's share of one micro-batch: rows end to end, no padding.

    Attributes:
        ids_T: int64, the inputs; of images uint8 (T, P), the values of each patch.
        target_N: int64, what is to be predicted: for text N is T, the token after each in the
            stream; for labelled documents and images N is B, the label of each.
        position_T: int32, position inside its document or, if it began in an earlier row, its row.
        offsets_B1: int32, sequence b is tokens offsets[b] : offsets[b + 1]; one starts at every
            row and every separator, and attention stays inside.
        first_token: index of this rank's first token in the micro-batch of all ranks.
        tokens: of the micro-batch, all ranks.
        targets: likewise.
    """

    ids_T: Tensor
    target_N: Tensor
    position_T: Tensor
    offsets_B1: Tensor
    first_token: int
    tokens: int
    targets: int

    @property
    def shown_T(self) -> Tensor:
        """(T,) the ids by which a trace names the tokens; patches have none, -1."""
        return self.ids_T if self.ids_T.dim() == 1 else torch.full_like(self.position_T, -1)

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device; the offsets stay, the model reads them on the host."""
        tensors = (self.ids_T, self.target_N, self.position_T)
        ids_T, target_N, position_T = (x.to(device, non_blocking=True) for x in tensors)
        return replace(self, ids_T=ids_T, target_N=target_N, position_T=position_T)
