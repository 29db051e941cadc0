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


@given(st.permutations(range(7)), st.integers(0, 7))
def test_rank_and_slot_find_the_expert(order, cut):
    placement = Placement((tuple(order[:cut]), tuple(order[cut:])))
    where = zip(placement.rank_of_expert(), placement.slot_of_expert(), strict=True)
    assert [placement.experts_of_rank[rank][slot] for rank, slot in where] == list(range(7))


def test_a_missing_expert_is_refused():
    with pytest.raises(ConfigError, match=r"want every expert 0\.\.E-1 on exactly one rank"):
        Placement(((0,), (2,)))
