"""Which rows a message has, and how many there may be."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_router.dispatch.where import (
    Tables,
    Where,
    lay_out,
    pad,
    plan_within,
    rows_of_experts,
    slots_of_rank,
)
from moe_router.placement import Placement
from moe_router.routing.plan import plan_from_ids
from moe_router.types import Choice
from moe_router_kernels.reference_ranks import goes_to
from tests.strategies import targets


def laid_out(rank_TK, bound_W):
    """Rows of choices whose slot is 10 times their rank, and whose weight is theirs alone."""
    slot_TK = torch.where(rank_TK < 0, -1, 10 * rank_TK)
    weight_TK = 1.0 + torch.arange(rank_TK.numel()).view(rank_TK.shape)
    return lay_out(Where(rank_TK, slot_TK), weight_TK, bound_W, int(bound_W.sum())), weight_TK


@settings(max_examples=15)
@given(targets(max_tokens=9, max_groups=4), st.integers(0, 3))
def test_rows_are_those_of_a_plan_with_room_behind_each_rank(routing, room):
    rank_TK, W = pad(routing[0], max(len(routing[0]), 1), -1), routing[1]
    goes_TW = goes_to(rank_TK, W)
    bound_W = goes_TW.sum(0) + room
    rows, weight_TK = laid_out(rank_TK, bound_W)
    plan = plan_from_ids(torch.where(goes_TW, torch.arange(W), -1).int(), W)
    live = rows.src_R >= 0
    assert torch.equal(rows.src_R[live], plan.src_R[: int(plan.offsets_G1[-1])])
    assert torch.equal(rows.row_TW >= 0, goes_TW) and not rows.overflow
    peer_R = torch.arange(W).repeat_interleave(bound_W)
    for t, w in goes_TW.nonzero().tolist():
        row = int(rows.row_TW[t, w])
        assert int(rows.src_R[row]) == t and int(peer_R[row]) == w
    K = rank_TK.size(1)
    weight_RK, id_RK = rows.packed_RP[:, :K].contiguous().view(torch.float32), rows.packed_RP[:, K:]
    here_RK = live[:, None] & (rank_TK[rows.src_R] == peer_R[:, None])
    assert torch.equal(id_RK, torch.where(here_RK, 10 * peer_R[:, None], -1).int())
    assert torch.equal(weight_RK, torch.where(here_RK, weight_TK[rows.src_R], 0.0))


@pytest.mark.parametrize("bound, overflow", [((2, 2), False), ((1, 2), True), ((2, 0), True)])
def test_who_finds_no_slot_is_dropped_and_told(bound, overflow):
    rank_TK = torch.tensor([[0, 1], [-1, 0], [1, 1]], dtype=torch.int32)
    rows, _ = laid_out(rank_TK, torch.tensor(bound))
    assert bool(rows.overflow) is overflow
    kept = [min(2, n) for n in bound]
    assert (rows.row_TW >= 0).sum(0).tolist() == kept
    first_come = rows.row_TW[0].tolist()
    assert first_come == [0 if bound[0] else -1, bound[0] if bound[1] else -1]


def test_a_plan_of_too_few_rows_loses_the_last_ones():
    id_NK = torch.tensor([[0, 1], [1, -1], [0, 2]], dtype=torch.int32)
    whole, fits = plan_within(id_NK, 3, 6)
    assert fits is None and whole.offsets_G1.tolist() == [0, 2, 4, 5]
    cut, too_few = plan_within(id_NK, 3, 3)
    assert too_few and cut.offsets_G1.tolist() == [0, 2, 3, 3]
    assert cut.src_R.tolist() == [0, 2, 0]
    assert cut.row_TK.tolist() == [[0, 2], [-1, -1], [1, -1]]


def test_bounds_are_a_multiple_of_what_even_routing_sends():
    four = Placement.contiguous(8, 4)
    # a token with one choice goes to one rank in four; with every choice, to all of them
    assert slots_of_rank(100, four, 1, 2.0) == [50] * 4
    assert slots_of_rank(100, four, 8, 2.0) == [100] * 4
    # 1 - C(6, 2) / C(8, 2) = 13 / 28
    assert slots_of_rank(100, four, 2, 1.0) == [47] * 4
    uneven = Placement(((0, 1, 2, 3, 4, 5), (6, 7), ()))
    assert slots_of_rank(100, uneven, 1, 1.0) == [75, 25, 0]
    assert rows_of_experts(100, uneven, 0, 2, 300, 1.0) == 450
    assert rows_of_experts(100, uneven, 0, 2, 100, 2.0) == 200  # no more than arrive
    assert rows_of_experts(100, uneven, 2, 2, 300, 1.0) == 0


def test_padding_fills_or_cuts():
    x_TD = torch.ones(2, 3, requires_grad=True)
    assert pad(x_TD, 4).sum(1).tolist() == [3, 3, 0, 0]
    assert pad(x_TD, 1).shape == (1, 3) and pad(x_TD[:0], 2, -1).tolist() == [[-1] * 3] * 2
    pad(x_TD, 4).sum().backward()
    assert torch.equal(x_TD.grad, torch.ones(2, 3))


def test_a_choice_goes_to_its_own_ranks_copy_or_to_one_by_token_index():
    placement = Placement(((0, 1), (2, 0), (0, 3)))  # three copies of expert 0
    target_TK = torch.tensor([[0, 1], [0, 2], [0, -1], [0, 3]], dtype=torch.int32)
    choice = Choice(target_TK, torch.ones(target_TK.shape))
    plan = plan_from_ids(target_TK, 4)
    for rank in range(3):
        rank_TK, slot_TK = Tables(rank).find(choice, plan, placement, first_token=7)
        own_slot = placement.experts_of_rank[rank].index(0)
        assert rank_TK[:, 0].tolist() == [rank] * 4 and slot_TK[:, 0].tolist() == [own_slot] * 4
        assert rank_TK[:, 1].tolist() == [0, 1, -1, 2] and slot_TK[:, 1].tolist() == [1, 0, -1, 1]
    elsewhere = Placement(((1,), (0,), (2, 0), (3, 0)))
    rank_TK, slot_TK = Tables(0).find(choice, plan, elsewhere, first_token=7)
    assert rank_TK[:, 0].tolist() == [2, 3, 1, 2]  # tokens 7, 8, 9, 10 by three copies
    assert slot_TK[:, 0].tolist() == [1, 1, 0, 1]
