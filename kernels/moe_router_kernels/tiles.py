"""How each expert GEMM is cut, by its shape: measured on an H100, bf16 (docs/log.md).

A table, not an autotuner: the first step does not wait, and the same shape always takes the same
sums in the same order. The height of a tile, and with it that order, changes where a group has more
than 24 or 96 rows on average; and where rows are fewer than a fourth of the groups, or of one token
alone, a forward pass without gradients multiplies vectors. Inside each of the four regimes a row
does not see how many others there are.
"""

import os
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Tile:
    """The shape of a tile, tiles of M that share a band, and the pipeline."""

    m: int = 128
    n: int = 128
    k: int = 64
    band: int = 8
    warps: int = 8
    stages: int = 3
    flatten: bool = False


@dataclass(frozen=True, slots=True)
class Few:
    """Matrix rows and columns that a program of `few_rows` takes at a time, and its warps."""

    rows: int = 8
    span: int = 1024
    warps: int = 8


def is_few(tokens: int, rows: int, groups: int) -> bool:
    """Rows hardly share a group: its weights may be read for each of them."""
    return tokens == 1 or 4 * rows <= groups


@dataclass(frozen=True, slots=True)
class Problem:
    """Attributes:
    rows: R, a bound.
    groups: G.
    hidden: F.
    m: height of a tile of rows; the same for all GEMMs of one Plan.
    """

    rows: int
    groups: int
    hidden: int
    few: bool
    m: int
    dtype: torch.dtype

    @classmethod
    def of(cls, x_TD: Tensor, gate_up: Tensor, src_R: Tensor) -> "Problem":
        R, G = src_R.numel(), gate_up.size(0)
        each = R / max(G, 1)
        if os.environ.get("TRITON_INTERPRET") == "1":
            m = 16
        elif x_TD.dtype == torch.float32:
            m = 64
        else:
            m = 128 if each > 96 else 64 if each > 24 else 16
        few = is_few(x_TD.size(0), R, G)
        return cls(R, G, gate_up.size(1) // 2, few, m, x_TD.dtype)


_WIDE = Tile(n=256, flatten=True)
_TABLE = {
    "up": Tile(flatten=True),  # n columns of gate and as many of up
    "down": _WIDE,
    "down_backward": _WIDE,
    "up_backward": _WIDE,
    "gate_up_weights": Tile(n=256),
    "down_weights": Tile(n=256),
}

# a few rows for each group: what counts is to read the weights once, with many loads in flight
_FEW = {
    "up": Tile(m=16, n=64, k=128, warps=4, stages=4),
    "down": Tile(m=16, n=128, k=128, warps=4, stages=4),
}


def pick(gemm: str, problem: Problem) -> Tile:
    """The tile of one of the six GEMMs of a layer and its backward pass."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return Tile(m=16, n=32, k=32, band=2, warps=4, stages=2)
    if problem.dtype == torch.float32:
        return Tile(m=64, n=64, k=32, warps=4, stages=3)
    if problem.m == 16 and gemm in _FEW:
        return _FEW[gemm]
    tile = _TABLE[gemm]
    if gemm.endswith("weights") or problem.m == 128:
        return tile
    return Tile(m=problem.m, n=128, k=64, warps=4, stages=4)
