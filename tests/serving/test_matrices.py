import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_router.errors import GatingError
from moe_router.serving import router_pb2 as pb
from moe_router.serving.matrices import from_matrix, to_matrix


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([torch.float32, torch.bfloat16, torch.int32]),
    st.integers(0, 5),
    st.integers(0, 5),
    st.booleans(),
)
def test_there_and_back_is_the_same_to_the_bit(dtype, rows, columns, transposed):
    x = (torch.randn(columns, rows).T if transposed else torch.randn(rows, columns)).mul(99)
    x = x.to(dtype)
    back = from_matrix(pb.Matrix.FromString(to_matrix(x).SerializeToString()), "x")
    assert back.dtype == dtype and back.shape == (rows, columns) and torch.equal(back, x)


def test_rows_are_contiguous_and_little_endian():
    matrix = to_matrix(torch.tensor([[1, 2], [3, -4]], dtype=torch.int32))
    assert matrix.int32 == struct.pack("<4i", 1, 2, 3, -4)
    assert to_matrix(torch.tensor([[1.5]])).float32 == struct.pack("<f", 1.5)
    assert to_matrix(torch.tensor([[1.0]]).bfloat16()).bfloat16 == b"\x80\x3f"


def test_the_tensor_is_its_own():
    matrix = to_matrix(torch.zeros(1, 1))
    from_matrix(matrix, "x").fill_(7)
    assert matrix.float32 == bytes(4)


@pytest.mark.parametrize(
    ("matrix", "said"),
    [
        (pb.Matrix(rows=1, columns=1), "x: no values, want one of float32, bfloat16, int32"),
        (pb.Matrix(rows=2, columns=2, float32=bytes(15)), "x: 15 bytes, want 16: 2 x 2 of float32"),
        (pb.Matrix(rows=2, columns=2, bfloat16=bytes(16)), "x: 16 bytes, want 8: 2 x 2 of bfloat"),
        (pb.Matrix(rows=1, columns=1, int32=b""), "x: 0 bytes, want 4: 1 x 1 of int32"),
        (pb.Matrix(rows=2**31, columns=2**31, float32=b""), "want at most 16777216 rows and col"),
        (pb.Matrix(rows=0, columns=2**32 - 1, float32=b""), "x: 0 x 4294967295, want at most"),
    ],
)
def test_what_is_no_matrix_is_refused(matrix, said):
    with pytest.raises(GatingError, match=said):
        from_matrix(matrix, "x")
