import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_router.errors import ConfigError
from moe_router.placement import Placement


@given(st.integers(1, 40), st.integers(1, 9))
def test_contiguous_is_even_to_within_one_expert(experts, ranks):
    placement = Placement.contiguous(experts, ranks)
    sizes = [len(held) for held in placement.experts_of_rank]
    assert (placement.experts, placement.ranks) == (experts, ranks)
    assert max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes, reverse=True)


@given(st.permutations(range(7)), st.integers(0, 7), st.sets(st.integers(0, 6)))
def test_copies_are_found_where_they_lie(order, cut, repeated):
    again = tuple(e for e in order[cut:] if e in repeated)
    placement = Placement((tuple(order[:cut]), tuple(order[cut:]), again))
    assert placement.experts == 7
    for expert, copies in enumerate(placement.copies()):
        assert len(copies) == 1 + (expert in again) and sorted(copies) == copies
        assert all(placement.experts_of_rank[r][slot] == expert for r, slot in copies)
    spoken_for = [placement.first_slots(rank) for rank in range(3)]
    assert [len(slots) for slots in spoken_for] == [cut, 7 - cut, 0]


@pytest.mark.parametrize("held", [((0,), (2,)), ((0, 1, 0),)])
def test_a_missing_or_doubled_expert_is_refused(held):
    with pytest.raises(
        ConfigError, match=r"want every expert 0\.\.E-1 on some rank, and on none tw"
    ):
        Placement(held)


@st.composite
def loads(draw):
    """Loads of experts, ranks, and slots enough."""
    experts, ranks = draw(st.integers(1, 24)), draw(st.integers(1, 6))
    load = st.one_of(st.integers(0, 50).map(float), st.floats(0, 1e6))
    load_E = draw(st.lists(load, min_size=experts, max_size=experts))
    fewest = -(-experts // ranks)
    return load_E, ranks, draw(st.integers(fewest, min(experts, fewest + 3)))


@given(loads())
def test_balanced_fills_every_slot_and_is_never_worse_than_dealing_in_turn(case):
    load_E, ranks, slots = case
    placement = Placement.balanced(load_E, ranks, slots)  # which refuses an expert without a place
    assert placement.experts == len(load_E)
    assert [len(held) for held in placement.experts_of_rank] == [slots] * ranks
    ours = placement.load_of_ranks(load_E)
    assert sum(ours) == pytest.approx(sum(load_E))
    in_turn = Placement.dealt(len(load_E), ranks, slots).load_of_ranks(load_E)
    assert max(ours) <= max(in_turn)


@given(st.integers(1, 6), st.integers(1, 6))
def test_dealt_is_contiguous_where_no_slot_is_spare(ranks, slots):
    experts = ranks * slots
    assert Placement.dealt(experts, ranks, slots) == Placement.contiguous(experts, ranks)


def test_the_heaviest_expert_gets_the_copies():
    load_E = [40.0, *[60 / 7] * 7]
    without = Placement.balanced(load_E, 2, 4)
    assert max(without.load_of_ranks(load_E)) == pytest.approx(40 + 3 * 60 / 7)  # room for no more
    copied = Placement.balanced(load_E, 2, 5)
    assert len(copied.copies()[0]) == 2
    assert max(copied.load_of_ranks(load_E)) == pytest.approx(50, rel=0.1)


def test_heavy_experts_are_spread():
    placement = Placement.balanced([9, 8, 7, 1, 1, 1], 3, 2)
    assert sorted(placement.load_of_ranks([9, 8, 7, 1, 1, 1])) == [8, 9, 10]


@pytest.mark.parametrize("slots", [3, 9])
def test_too_few_slots_and_too_many_are_refused(slots):
    with pytest.raises(ConfigError, match=rf"{slots} slots on each of 2 ranks: want 4 to 8"):
        Placement.dealt(8, 2, slots)
