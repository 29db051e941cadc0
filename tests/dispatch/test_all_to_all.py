"""`all_to_all` equals `local`, forward and backward, for even, uneven and empty ranks."""

import pytest
import torch

from moe_router.placement import Placement
from tests.dispatch import work
from tests.gloo import run_ranks

BASE = {"experts": 6, "top_k": 3, "hidden": 12, "balance_loss": 0.5, "z_loss": 0.1}
VARIANTS = {
    "plain": {},
    "groups_nulls_jitterless": {"expert_groups": 3, "top_groups": 2, "null_experts": 2},
    "sequence": {"sequence_balance_loss": 0.3, "score": "sigmoid", "shared_hidden": 4},
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(
    "placement, bounds",
    [
        (((0, 1, 2), (3, 4, 5)), (0, 10, 20)),
        (((5, 0, 2, 1), (4, 3)), (0, 3, 20)),  # uneven experts, out of order, uneven tokens
        (((0, 1, 2, 3, 4, 5), ()), (0, 0, 9)),  # a rank without experts, one without tokens
        (((0,), (1, 2), (3,), (4, 5)), (0, 4, 4, 11, 16)),
        (((0, 1, 2, 3, 4, 5),), (0, 12)),
    ],
    ids=["even", "uneven", "empty", "four", "one"],
)
def test_equals_local_forward_and_backward(name, placement, bounds):
    variant = BASE | VARIANTS[name]
    ranks = len(placement)
    whole = work.run_whole(variant, bounds)
    parts = run_ranks(ranks, work.run_shard, variant, placement, bounds)
    close = {"rtol": 1e-5, "atol": 1e-6}
    for key in ("delta", "x"):
        torch.testing.assert_close(torch.cat([p[key] for p in parts]), whole[key], **close)
    for key in ("router", "loss"):
        torch.testing.assert_close(sum(p[key] for p in parts), whole[key], **close)
    for part, experts in zip(parts, placement, strict=True):
        for key in ("gate_up", "down"):
            torch.testing.assert_close(part[key], whole[key][list(experts)], **close)


@pytest.mark.parametrize("drop", ["position", "score"])
def test_with_capacity_one_rank_gets_the_same_groups(drop):
    """Capacity is counted per source rank; one rank repeats it with `sources`."""
    from moe_router.config import MoEConfig
    from moe_router.routing import make_plan
    from moe_router.routing.decide import capacity

    variant = BASE | {"capacity_factor": 0.6, "drop": drop}
    bounds = (0, 10, 20)
    placement = Placement.contiguous(6, 2).experts_of_rank
    parts = run_ranks(2, work.run_shard, variant, placement, bounds)

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


def test_repeats_bit_by_bit():
    variant = BASE | VARIANTS["plain"]
    placement = Placement.contiguous(6, 2).experts_of_rank
    first, second = (run_ranks(2, work.run_shard, variant, placement, (0, 9, 20)) for _ in "12")
    for one, other in zip(first, second, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_fp64_weights_travel_whole():
    assert max(run_ranks(2, work.run_double, BASE)) < 1e-12


def test_a_rank_without_experts_joins_the_backward_that_only_experts_need():
    placement = ((0, 1, 2, 3, 4, 5), ())
    all_of_them, none = run_ranks(2, work.run_without_gradient_to_the_rows, BASE, placement)
    assert all_of_them.norm() > 0 and none.shape == (0, 8, 12)
