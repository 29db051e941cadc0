import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moe_router.training.data import permute


@given(st.integers(1, 3000), st.integers(-(2**63), 2**63), st.integers(0, 10**6))
@example(length=1, seed=0, epoch=0)
@example(length=2, seed=0, epoch=0)
@example(length=3, seed=0, epoch=0)
@settings(max_examples=60, deadline=None)
def test_every_row_comes_exactly_once(length: int, seed: int, epoch: int) -> None:
    out = permute(np.arange(length), length, seed=seed, epoch=epoch)
    assert np.array_equal(np.sort(out), np.arange(length))


@given(st.integers(1, 2**40), st.integers(0, 100), st.data())
@settings(max_examples=40, deadline=None)
def test_a_part_is_shuffled_as_in_the_whole(length: int, epoch: int, data: st.DataObject) -> None:
    index = data.draw(st.lists(st.integers(0, length - 1), min_size=1, max_size=20, unique=True))
    out = permute(np.array(index), length, seed=1, epoch=epoch)
    assert len(set(out.tolist())) == len(index) and 0 <= out.min() <= out.max() < length
    alone = [permute(np.array([i]), length, seed=1, epoch=epoch)[0] for i in index]
    assert out.tolist() == alone


@given(st.integers(30, 5000), st.integers(0, 50), st.integers(0, 50))
@settings(max_examples=25, deadline=None)
def test_other_epochs_and_seeds_are_other_shuffles(length: int, seed: int, epoch: int) -> None:
    index = np.arange(length)
    one = permute(index, length, seed=seed, epoch=epoch)
    assert not np.array_equal(one, permute(index, length, seed=seed, epoch=epoch + 1))
    assert not np.array_equal(one, permute(index, length, seed=seed + 1, epoch=epoch))
    assert not np.array_equal(one, index)


def test_it_looks_random() -> None:
    """Over many keys, each place of ten holds each row equally often, also pairs of neighbours."""
    table = np.array([permute(np.arange(10), 10, seed=s, epoch=0) for s in range(2000)])
    for column in range(10):
        count = np.bincount(table[:, column], minlength=10)
        assert ((count - 200) ** 2 / 200).sum() < 35  # chi-square, 9 degrees: p = 6e-5
    neighbours = (table[:, 1:] - table[:, :-1] == 1).mean()
    assert abs(neighbours - 0.1) < 0.02


def test_it_is_the_same_on_every_machine() -> None:
    assert permute(np.arange(8), 8, seed=3, epoch=1).tolist() == [5, 3, 7, 0, 2, 4, 1, 6]
