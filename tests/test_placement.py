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
