import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_router.errors import ConfigError
from moe_router.routing import make_plan, plan_from_ids
from moe_router.types import Choice
from tests.strategies import targets


@settings(max_examples=25, deadline=None)
@given(targets(), st.integers(1, 4), st.sampled_from(["position", "score"]), st.integers(1, 2))
def test_capacity_is_never_exceeded_and_never_wasted(routing, capacity, drop, sources):
    target_TK, groups = routing
    target_TK = target_TK[: len(target_TK) - len(target_TK) % sources]
    T = len(target_TK)
    torch.manual_seed(0)
    choice = Choice(target_TK, torch.rand(target_TK.shape))
    position_T = torch.arange(T, dtype=torch.int32) % 3
    plan = make_plan(
        choice, groups, capacity=capacity, drop=drop, position_T=position_T, sources=sources
    )
    for source in range(sources):
        mine = slice(source * T // sources, (source + 1) * T // sources)
        for group in range(groups):
            asked = target_TK[mine] == group
            kept = asked & (plan.row_TK[mine] >= 0)
            assert kept.sum() == min(int(asked.sum()), capacity)
            lost = asked & ~kept
            if lost.any() and drop == "score":
                weight = choice.weight_TK[mine]
                assert weight[lost].max() <= weight[kept].min()
            if lost.any() and drop == "position":
                position = position_T[mine, None].expand_as(asked)
                assert position[lost].min() >= position[kept].max()


@settings(max_examples=20, deadline=None)
@given(targets())
def test_without_capacity_the_plan_is_that_of_the_ids(routing):
    target_TK, groups = routing
    ours = make_plan(Choice(target_TK, torch.ones(target_TK.shape)), groups)
    for name in ("src_R", "choice_R", "offsets_G1", "row_TK"):
        assert torch.equal(getattr(ours, name), getattr(plan_from_ids(target_TK, groups), name))


def test_early_positions_of_all_sequences_come_first():
    """Time-major: the second sequence's start beats the first one's end."""
    choice = Choice(torch.zeros(6, 1, dtype=torch.int32), torch.ones(6, 1))
    position_T = torch.tensor([0, 1, 2, 0, 1, 2], dtype=torch.int32)
    plan = make_plan(choice, 1, capacity=3, position_T=position_T)
    assert (plan.row_TK.flatten() >= 0).tolist() == [True, True, False, True, False, False]


def test_capacity_never_falls_back_to_another_order():
    choice = Choice(torch.zeros(3, 1, dtype=torch.int32), torch.ones(3, 1))
    position_T = torch.arange(3, dtype=torch.int32)
    with pytest.raises(ConfigError, match="position_T=None: want positions, for drop=position"):
        make_plan(choice, 1, capacity=1)
    with pytest.raises(ConfigError, match="drop=scores: want position or score"):
        make_plan(choice, 1, capacity=1, drop="scores")
    with pytest.raises(ConfigError, match="sources=2: want a divisor of 3 tokens"):
        make_plan(choice, 1, capacity=1, position_T=position_T, sources=2)
