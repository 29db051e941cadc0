"""Keys and values of the tokens already seen; every layer keeps its own lengths."""

import torch
from torch import Tensor


class LayerCache:
    """The cache of one layer: (B, S, H, d) storage that grows, and a length per sequence."""

    def __init__(self, sequences: int) -> None:
        self.lengths = [0] * sequences
        self._key: Tensor | None = None
        self._value: Tensor | None = None

    def append(self, key_THd: Tensor, value_THd: Tensor, counts: list[int]) -> None:
        """Write the next `counts[b]` tokens of each sequence b; they stand packed in T."""
        grown = [length + count for length, count in zip(self.lengths, counts, strict=True)]
        self._key = self._room(self._key, key_THd, max(grown))
        self._value = self._room(self._value, value_THd, max(grown))
        start = 0
        for b, count in enumerate(counts):
            self._key[b, self.lengths[b] : grown[b]] = key_THd[start : start + count]
            self._value[b, self.lengths[b] : grown[b]] = value_THd[start : start + count]
            start += count
        self.lengths = grown

    def all(self) -> tuple[Tensor, Tensor, Tensor]:
        """(B, S, H, d) keys and values up to the longest sequence, and (B,) int64 lengths."""
        assert self._key is not None and self._value is not None, "nothing was appended"
        longest = max(self.lengths)
        length_B = torch.tensor(self.lengths, device=self._key.device)
        return self._key[:, :longest], self._value[:, :longest], length_B

    def _room(self, held: Tensor | None, new_THd: Tensor, longest: int) -> Tensor:
        """The storage, doubled when it is full."""
        if held is not None and held.size(1) >= longest:
            return held
        shape = (len(self.lengths), 1 << (longest - 1).bit_length(), *new_THd.shape[1:])
        larger = new_THd.new_zeros(shape)
        if held is not None:
            larger[:, : held.size(1)] = held
        return larger


class KVCache:
    """One LayerCache for each block of a model.

    Args:
        layers: blocks.
        sequences: B, which every forward pass with this cache must bring.
    """

    def __init__(self, layers: int, sequences: int) -> None:
        self.layers = [LayerCache(sequences) for _ in range(layers)]
        self.positions = [0] * sequences  # the next position of each sequence
