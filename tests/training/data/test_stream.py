import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_router.errors import DataError
from moe_router.training.data import Segments, TokenStream

PARTS = st.lists(st.lists(st.integers(0, 255), max_size=12), min_size=1, max_size=6)


@given(PARTS, st.data())
@settings(max_examples=50, deadline=None)
def test_segments_read_as_one_array(parts: list[list[int]], data: st.DataObject) -> None:
    types = [np.uint8, np.uint16, np.uint32]
    line = Segments([np.array(p, types[i % 3]) for i, p in enumerate(parts)])
    whole = np.array([t for p in parts for t in p], np.int32)
    assert len(line) == len(whole)
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, len(whole)))
    out = np.full(stop - start, -7, np.int32)
    line.read(start, out)
    assert np.array_equal(out, whole[start:stop])
    cut = line.cut(start, stop)
    again = np.full(len(cut), -7, np.int32)
    cut.read(0, again)
    assert np.array_equal(again, out)


def test_rows_overlap_by_one_and_cover_the_stream() -> None:
    stream = TokenStream(
        Segments([np.arange(10, dtype=np.uint8)]), seq_len=3, vocab=10, where="here"
    )
    assert stream.rows == 3
    assert [stream.row(i).tolist() for i in range(3)] == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]
    assert stream.row(0).dtype == np.int32
    assert stream.rows_at([2, 0]).tolist() == [[6, 7, 8, 9], [0, 1, 2, 3]]
    for i in (-1, 3):
        with pytest.raises(IndexError, match=rf"row {i} of here: want 0..2"):
            stream.row(i)


def test_too_few_tokens_say_what_to_change() -> None:
    with pytest.raises(
        DataError, match=r"f: the held-out part has 8 tokens, want at least 9 for .*data.seq_len"
    ):
        TokenStream(
            Segments([np.zeros(8, np.uint8)]), seq_len=8, vocab=2, where="f: the held-out part"
        )
    assert TokenStream(Segments([np.zeros(9, np.uint8)]), seq_len=8, vocab=2, where="f").rows == 1


@pytest.mark.parametrize("token", [300, 2**31 + 5])
def test_a_foreign_token_is_refused_when_it_is_read(token: int) -> None:
    tokens = np.array([1, 2, 3, token, 4], np.uint32)
    stream = TokenStream(Segments([tokens]), seq_len=2, vocab=257, where="x.npy")
    assert stream.rows == 2
    for read in (lambda: stream.row(1), lambda: stream.counts(5)):
        with pytest.raises(DataError, match=f"x.npy: token {token}, want below 257.*tokenizer"):
            read()


def test_counts_stop_at_the_limit() -> None:
    parts = [np.array([1, 1, 2], np.uint8), np.array([2, 0], np.uint16)]
    stream = TokenStream(Segments(parts), seq_len=2, vocab=4, where="x")
    assert stream.counts(4).tolist() == [0, 2, 2, 0]
    assert stream.counts(99).tolist() == [1, 2, 2, 0]
