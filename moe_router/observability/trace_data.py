"""What a routing trace holds, in memory."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class LayerTrace:
    """What one routed layer decided.

    Attributes:
        groups: experts; a target >= groups is a null expert, which costs nothing.
        target_TK: int32, -1 is no choice.
        weight_TK: fp32.
        kept_TK: bool, whether the choice got a row.
    """

    groups: int
    target_TK: Tensor
    weight_TK: Tensor
    kept_TK: Tensor

    @property
    def dropped_TK(self) -> Tensor:
        """bool: asked for an expert and got no row."""
        return (self.target_TK >= 0) & (self.target_TK < self.groups) & ~self.kept_TK


@dataclass(frozen=True, slots=True)
class TraceRow:
    """One token in one layer, as a user reads it; the tuples have one item a choice.

    Attributes:
        token: global index of the token.
        id, position: the token's id (-1 if it was not told) and place in its sequence.
        drops: whether the choice asked for an expert and got no row.
    """

    token: int
    id: int
    position: int
    layer: int
    groups: tuple[int, ...]
    weights: tuple[float, ...]
    drops: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class Trace:
    """Recorded passes, one after another along T.

    Attributes:
        token_T: int64, global index of each token.
        ids_T, position_T: int64 and int32.
        layers: by layer index.
    """

    token_T: Tensor
    ids_T: Tensor
    position_T: Tensor
    layers: dict[int, LayerTrace]

    @property
    def first_token(self) -> int:
        """Global index of the first recorded token; 0 for an empty trace."""
        return int(self.token_T[0]) if self.token_T.numel() else 0

    def rows(self) -> Iterator[TraceRow]:
        """Token by token, layer by layer; choices that are none (-1) are left out."""
        tokens = (self.token_T.tolist(), self.ids_T.tolist(), self.position_T.tolist())
        lists = {
            layer: (t.target_TK.tolist(), t.weight_TK.tolist(), t.dropped_TK.tolist())
            for layer, t in self.layers.items()
        }
        for i, (token, id_, position) in enumerate(zip(*tokens, strict=True)):
            for layer, (target, weight, drop) in lists.items():
                ks = [k for k, group in enumerate(target[i]) if group >= 0]
                groups = tuple(target[i][k] for k in ks)
                weights = tuple(weight[i][k] for k in ks)
                drops = tuple(drop[i][k] for k in ks)
                yield TraceRow(token, id_, position, layer, groups, weights, drops)
