"""Every transport equals `local`, forward and backward, for even, uneven, empty and hot ranks."""

import pytest
import torch

from moe_router.config import MoEConfig
from moe_router.placement import Placement
from moe_router.routing import make_plan
from moe_router.routing.decide import capacity
from tests.dispatch import work
from tests.gloo import run_ranks

pytestmark = pytest.mark.parametrize("name", work.TRANSPORTS)
BASE = {"experts": 6, "top_k": 3, "hidden": 12, "balance_loss": 0.5, "z_loss": 0.1}
VARIANTS = {
    "plain": {},
    "groups_nulls_jitterless": {"expert_groups": 3, "top_groups": 2, "null_experts": 2},
    "sequence": {"sequence_balance_loss": 0.3, "score": "sigmoid", "shared_hidden": 4},
}
EVEN = ((0, 1, 2), (3, 4, 5))
UNEVEN = ((5, 0, 2, 1), (4, 3))
ONE_SIDED = ((0, 1, 2, 3, 4, 5), ())
FOUR = ((0,), (1, 2), (3,), (4, 5))
ROUTINGS = {
    "uniform": ("uniform", EVEN, (0, 12, 24)),
    "zipf": ("zipf", EVEN, (0, 12, 24)),
    "one_hot_expert": ("hot_expert", EVEN, (0, 12, 24)),
    "one_hot_rank": ("hot_rank", EVEN, (0, 12, 24)),
    "empty_expert": ("empty_expert", EVEN, (0, 12, 24)),
    "uneven_placement_and_ragged_sources": ("zipf", UNEVEN, (0, 3, 20)),
    "an_empty_rank_has_all_experts": ("uniform", ONE_SIDED, (0, 0, 9)),
    "one_rank_has_all_tokens": ("uniform", UNEVEN, (0, 11, 11)),
    "nobody_goes_anywhere": ("nobody", EVEN, (0, 4, 8)),
    "no_tokens_at_all": ("uniform", EVEN, (0, 0, 0)),
}


def assert_equals_local(parts, whole, placement, **tolerance):
    for key in ("out", "x", "weight"):
        torch.testing.assert_close(torch.cat([p[key] for p in parts]), whole[key], **tolerance)
    for part, experts in zip(parts, placement, strict=True):
        for key in ("gate_up", "down"):
            torch.testing.assert_close(part[key], whole[key][list(experts)], **tolerance)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_equals_local(name, routing):
    kind, placement, bounds = ROUTINGS[routing]
    for top_k, dtype, rtol in ((2, torch.float32, 1e-5), (1, torch.float64, 1e-12)):
        case = (kind, placement, bounds, top_k, dtype)
        whole = work.move_whole(*case)
        parts = run_ranks(2, work.move_part, name, *case)
        assert not any(part["overflow"] for part in parts)
        assert_equals_local(parts, whole, placement, rtol=rtol, atol=rtol / 10)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["uniform", "zipf", "hot_expert", "hot_rank", "empty_expert"])
def test_four_ranks_equal_local(name, kind):
    for bounds in ((0, 6, 12, 18, 24), (0, 0, 1, 20, 20)):
        case = (kind, FOUR, bounds, 3, torch.float32)
        parts = run_ranks(4, work.move_part, name, *case)
        whole = work.move_whole(*case)
        assert_equals_local(parts, whole, FOUR, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "placement, bounds",
    [
        (UNEVEN, (0, 3, 20)),
        (ONE_SIDED, (0, 0, 9)),
        pytest.param(FOUR, (0, 4, 4, 11, 16), marks=pytest.mark.slow),
        (((0, 1, 2, 3, 4, 5),), (0, 12)),
    ],
    ids=["uneven", "empty", "four", "one"],
)
def test_a_layer_equals_that_of_one_rank(name, variant, placement, bounds):
    variant = BASE | VARIANTS[variant]
    whole = work.run_whole(variant, bounds)
    parts = run_ranks(len(placement), work.run_shard, name, variant, placement, bounds)
    close = {"rtol": 1e-5, "atol": 1e-6}
    for key in ("delta", "x"):
        torch.testing.assert_close(torch.cat([p[key] for p in parts]), whole[key], **close)
    for key in ("router", "loss"):
        torch.testing.assert_close(sum(p[key] for p in parts), whole[key], **close)
    for part, experts in zip(parts, placement, strict=True):
        for key in ("gate_up", "down"):
            torch.testing.assert_close(part[key], whole[key][list(experts)], **close)


@pytest.mark.parametrize("drop", ["position", "score"])
def test_with_capacity_one_rank_gets_the_same_groups(name, drop):
    """Capacity is counted per source rank; one rank repeats it with `sources`."""
    variant = BASE | {"capacity_factor": 0.6, "drop": drop}
    bounds = (0, 10, 20)
    placement = Placement.contiguous(6, 2).experts_of_rank
    parts = run_ranks(2, work.run_shard, name, variant, placement, bounds)

    layer = work.whole_layer(MoEConfig(**variant))
    tokens = work.packed(work.batch(20)[0])
    plan = make_plan(
        layer.router(tokens),
        6,
        capacity=capacity(10, layer.config),
        drop=drop,
        position_T=tokens.position_T,
        sources=2,
    )
    kept = torch.cat([p["kept"] for p in parts])
    assert torch.equal(kept, plan.row_TK >= 0)
    assert not kept.all()


def test_repeats_bit_by_bit(name):
    placement = Placement.contiguous(6, 2).experts_of_rank
    args = (name, BASE, placement, (0, 9, 20))
    first, second = (run_ranks(2, work.run_shard, *args) for _ in "12")
    for one, other in zip(first, second, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_fp64_weights_travel_whole(name):
    assert max(run_ranks(2, work.run_double, name, BASE)) < 1e-12


def test_a_rank_without_experts_joins_the_backward_that_only_experts_need(name):
    args = (name, BASE, ONE_SIDED)
    all_of_them, none = run_ranks(2, work.run_without_gradient_to_the_rows, *args)
    assert all_of_them.norm() > 0 and none.shape == (0, 8, 12)
