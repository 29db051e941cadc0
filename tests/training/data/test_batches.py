from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_router.errors import ConfigError, DataError
from moe_router.training.data import (
    Batch,
    ByteTokenizer,
    Dataset,
    Segments,
    TokenStream,
    train_batch,
    val_batches,
)

S = 4


def dataset(rows: int, documents: int = 0) -> Dataset:
    """`rows` rows; token n of the stream is n mod 250, a few of them separators."""
    tokens = np.arange(rows * S + 1) % 250
    tokens[np.random.default_rng(0).integers(0, len(tokens), documents)] = 256
    stream = TokenStream(Segments([tokens.astype(np.uint16)]), seq_len=S, vocab=257, where="x")
    return Dataset(stream, stream, ByteTokenizer(), 5.0)


def step_ids(data: Dataset, step: int, *, accumulation: int, ranks: int, **keys: int) -> list:
    """Ids of a whole optimizer step, in the order of micro-step, rank, token."""
    parts = [
        train_batch(
            data, step=step, micro=m, accumulation=accumulation, rank=r, ranks=ranks, **keys
        )
        for m in range(accumulation)
        for r in range(ranks)
    ]
    return torch.cat([part.ids_T for part in parts]).tolist()


@given(st.integers(1, 60), st.integers(0, 40), st.integers(0, 5), st.sampled_from([1, 2, 4, 8]))
@settings(max_examples=25, deadline=None)
def test_any_number_of_ranks_and_micro_steps_reads_the_same(
    rows: int, step: int, seed: int, split: int
) -> None:
    data = dataset(rows)
    one = step_ids(data, step, accumulation=1, ranks=1, batch=8, seed=seed)
    assert one == step_ids(data, step, accumulation=1, ranks=split, batch=8, seed=seed)
    assert one == step_ids(data, step, accumulation=8 // split, ranks=split, batch=8, seed=seed)


@given(st.integers(1, 40), st.sampled_from([1, 2, 4]))
@settings(max_examples=25, deadline=None)
def test_each_epoch_reads_each_row_once_and_in_another_order(rows: int, batch: int) -> None:
    data = dataset(rows)
    stream = [
        tuple(ids)
        for step in range(-(-3 * rows // batch))
        for ids in np.reshape(
            step_ids(data, step, accumulation=1, ranks=1, batch=batch, seed=0), (-1, S)
        )
    ]
    epochs = [stream[e * rows : (e + 1) * rows] for e in range(3)]
    want = Counter(tuple(data.train.row(i)[:-1].tolist()) for i in range(rows))
    assert all(Counter(epoch) == want for epoch in epochs)
    if rows > 20:
        assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def batches(data: Dataset, **keys: int) -> Batch:
    defaults = {"batch": 8, "step": 3, "micro": 0, "accumulation": 1, "rank": 0, "ranks": 1}
    return train_batch(data, **{**defaults, "seed": 1, **keys})


@given(st.integers(1, 50), st.integers(0, 30), st.integers(0, 9))
@settings(max_examples=25, deadline=None)
def test_sequences_start_at_rows_and_separators(rows: int, documents: int, step: int) -> None:
    data = dataset(rows, documents)
    batch = batches(data, step=step)
    ids, offsets = batch.ids_T.tolist(), batch.offsets_B1.tolist()
    want = [t for t in range(len(ids)) if t % S == 0 or ids[t] == 256]
    assert offsets == [*want, len(ids)]
    position = [t - max(o for o in want if o <= t) for t in range(len(ids))]
    assert batch.position_T.tolist() == position
    assert (batch.ids_T.dtype, batch.target_N.dtype) == (torch.int64, torch.int64)
    assert (batch.position_T.dtype, batch.offsets_B1.dtype) == (torch.int32, torch.int32)


def test_each_target_is_the_next_token_of_the_stream() -> None:
    data = dataset(9)
    for batch in (batches(data), *val_batches(data, rows=9, batch=4, rank=0, ranks=1)):
        assert torch.equal(batch.target_N, (batch.ids_T + 1) % 250)


def test_tokens_are_numbered_over_the_ranks_of_a_micro_step() -> None:
    data = dataset(50)
    shares = [batches(data, rank=r, ranks=2, accumulation=2, micro=1) for r in range(2)]
    assert [b.first_token for b in shares] == [0, 2 * S]
    assert {b.tokens for b in shares} == {4 * S}
    assert {len(b.ids_T) for b in shares} == {2 * S}


def test_batches_that_cannot_be_shared_are_refused() -> None:
    data = dataset(5)
    with pytest.raises(ConfigError, match=r"train.batch=8: want a multiple of 6"):
        batches(data, accumulation=2, ranks=3)
    for wrong in ({"rank": 1}, {"micro": 1}, {"step": -1}):
        with pytest.raises(IndexError, match=r"want step >= 0, micro in 0\.\.0, rank in"):
            batches(data, **wrong)


@given(st.integers(1, 40), st.integers(1, 60), st.integers(1, 10), st.integers(1, 6))
@settings(max_examples=50, deadline=None)
def test_evaluation_reads_each_row_once_for_any_number_of_ranks(
    have: int, rows: int, batch: int, ranks: int
) -> None:
    data, keys = dataset(have), {"rows": rows, "batch": batch, "ranks": ranks}
    if min(have, rows) < ranks:
        with pytest.raises(DataError, match=f"held-out rows .*want at least {ranks}, one for each"):
            list(val_batches(data, rank=0, **keys))
        return
    every = [list(val_batches(data, rank=r, **keys)) for r in range(ranks)]
    assert len({len(mine) for mine in every}) == 1
    seen = []
    for together in zip(*every, strict=True):
        assert all(len(b.ids_T) for b in together)
        assert {b.tokens for b in together} == {sum(len(b.ids_T) for b in together)}
        first = [b.first_token for b in together]
        assert first == [sum(len(b.ids_T) for b in together[:r]) for r in range(ranks)]
        assert together[0].tokens <= S * max(batch, 2 * ranks)
        seen += [t for b in together for t in b.ids_T.tolist()]
    assert seen == [t % 250 for t in range(min(have, rows) * S)]
