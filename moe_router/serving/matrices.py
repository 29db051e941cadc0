"""Between `Matrix` of router.proto and a tensor: contiguous rows, little-endian."""

import sys

import torch
from torch import Tensor

from moe_router.errors import GatingError
from moe_router.serving import router_pb2 as pb

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int32": torch.int32}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_SIDE = 1 << 24  # most rows or columns: an empty matrix of 4e9 columns is no work for a router

if sys.byteorder != "little":
    raise ImportError("moe_router.serving.matrices: big-endian machine, want a little-endian one")


def to_matrix(x: Tensor) -> pb.Matrix:
    """A (rows, columns) tensor of float32, bfloat16 or int32, on any device."""
    rows, columns = x.shape
    # flat, for a contiguous column may have any stride; as uint8, for numpy knows no bfloat16
    data = x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return pb.Matrix(rows=rows, columns=columns, **{_NAMES[x.dtype]: data})


def from_matrix(matrix: pb.Matrix, name: str) -> Tensor:
    """(rows, columns), in memory of its own.

    Args:
        name: of the field, for errors.

    Raises:
        GatingError: no values, too many rows or columns, or another number of bytes than they take.
    """
    kind = matrix.WhichOneof("values")
    if kind is None:
        raise GatingError(f"{name}: no values, want one of {', '.join(_DTYPES)}")
    rows, columns, data = matrix.rows, matrix.columns, getattr(matrix, kind)
    if max(rows, columns) > _SIDE:
        raise GatingError(f"{name}: {rows} x {columns}, want at most {_SIDE} rows and columns")
    want = rows * columns * _DTYPES[kind].itemsize
    if len(data) != want:
        raise GatingError(
            f"{name}: {len(data)} bytes, want {want}: {rows} x {columns} of {kind}, little-endian"
        )
    if not data:  # frombuffer refuses an empty buffer
        return torch.empty(rows, columns, dtype=_DTYPES[kind])
    return torch.frombuffer(bytearray(data), dtype=_DTYPES[kind]).view(rows, columns)
