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
    "copies": ("zipf", ((0, 1, 2, 3), (3, 4, 0, 5)), (0, 7, 24)),
    "every_rank_has_all_experts": ("uniform", ((0, 1, 2), (2, 1, 0)), (0, 9, 20)),
}


def assert_equals_local(parts, whole, placement, **tolerance):
    for key in ("out", "x", "weight"):
        torch.testing.assert_close(torch.cat([p[key] for p in parts]), whole[key], **tolerance)
    for expert, copies in enumerate(Placement(placement).copies()):
        for key in ("gate_up", "down"):
            summed = sum(parts[rank][key][slot] for rank, slot in copies)
            torch.testing.assert_close(summed, whole[key][expert], **tolerance)


def assert_all_equal_local(name, ranks, cases):
    for case, parts in zip(
        cases, zip(*run_ranks(ranks, work.move_parts, name, cases), strict=True), strict=True
    ):
        assert not any(part["overflow"] for part in parts), case
        rtol = 1e-12 if case[-1] == torch.float64 else 1e-5
        assert_equals_local(parts, work.move_whole(*case), case[1], rtol=rtol, atol=rtol / 10)


def test_equals_local(name):
    kinds = ((2, torch.float32), (1, torch.float64))
    assert_all_equal_local(name, 2, [(*r, *kind) for r in ROUTINGS.values() for kind in kinds])


@pytest.mark.slow
def test_four_ranks_equal_local(name):
    bounds = ((0, 6, 12, 18, 24), (0, 0, 1, 20, 20))
    kinds = ("uniform", "zipf", "hot_expert", "hot_rank", "empty_expert")
    copied = ((0, 5), (1, 2), (3, 0), (4, 5, 0))
    cases = [
        (kind, placement, cut, 3, torch.float32)
        for kind in kinds
        for placement in (FOUR, copied)
        for cut in bounds
    ]
    assert_all_equal_local(name, 4, cases)


@pytest.mark.slow
def test_eight_ranks_equal_local(name):
    """One expert a rank, copies, and ranks of several, of none; ranks without tokens."""
    bounds = (tuple(range(0, 33, 4)), (0, 0, 1, 9, 9, 20, 21, 32, 40))
    apart = Placement.contiguous(8, 8).experts_of_rank
    copied = Placement.dealt(12, 8, 3).experts_of_rank
    uneven = ((5,), (), (0, 7, 2), (1, 4), (), (3,), (6, 8), (9,))
    cases = [
        (kind, placement, cut, 3, torch.float32)
        for kind in ("uniform", "zipf", "hot_rank", "empty_expert")
        for placement in (apart, copied, uneven)
        for cut in bounds
    ]
    assert_all_equal_local(name, 8, cases)


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


@pytest.mark.parametrize("kind", ["hot_rank", "hot_expert"])
def test_what_does_not_fit_is_told_and_leaves_the_rest_right(name, kind):
    """Bounds of the mean load: only a transport that counts gets all tokens to one rank."""
    case = (kind, EVEN, (0, 12, 24), 1, torch.float32)
    parts = run_ranks(2, work.move_part, name, *case, 1.0)
    assert any(part["overflow"] for part in parts) == (name != "all_to_all")
    out_TD = torch.cat([part["out"] for part in parts])
    whole_TD = work.move_whole(*case)["out"]
    kept_T = out_TD.abs().sum(1) > 0
    torch.testing.assert_close(out_TD[kept_T], whole_TD[kept_T], rtol=1e-5, atol=1e-6)
    assert int(kept_T.sum()) >= 8 and all(part["x"].isfinite().all() for part in parts)
