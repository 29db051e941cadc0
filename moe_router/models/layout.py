"""How packed sequences are laid out for attention: padded to like lengths, and back."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Layout:
    """Attributes:
    lengths: tokens of each sequence.
    buckets: (B', S') int64 each, the token of each padded place; sequences of like length are
        together, so that padding at most doubles the length. Padding repeats the last token.
    place_T: int64, where each token lies in the flattened buckets, one after another.
    """

    lengths: list[int]
    buckets: list[Tensor]
    place_T: Tensor

    @classmethod
    def of(cls, offsets_B1: Tensor) -> "Layout":
        """Reads the offsets on the host: once per forward pass, not per layer."""
        offsets = offsets_B1.to("cpu", torch.int64)
        lengths = offsets.diff()
        size_B = torch.where(lengths > 0, lengths, 1).log2().ceil()
        place_T = torch.empty(int(offsets[-1]), dtype=torch.int64)
        buckets, base = [], 0
        for size in sorted(set(size_B[lengths > 0].tolist())):
            member = ((size_B == size) & (lengths > 0)).nonzero().flatten()
            length_B, first_B = lengths[member], offsets[member]
            place_S = torch.arange(int(length_B.max()))
            inside_BS = place_S < length_B[:, None]
            token_BS = first_B[:, None] + torch.minimum(place_S, length_B[:, None] - 1)
            flat = base + torch.arange(token_BS.numel()).view_as(token_BS)
            place_T[token_BS[inside_BS]] = flat[inside_BS]
            base += token_BS.numel()
            buckets.append(token_BS.to(offsets_B1.device))
        return cls(lengths.tolist(), buckets, place_T.to(offsets_B1.device))

    @property
    def uniform(self) -> bool:
        """Whether the tokens, as they stand, are one (B, S) batch."""
        return len(set(self.lengths)) == 1
