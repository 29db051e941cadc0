"""What the cost model says is what transports move: counted by hand, and by the transports."""

import pytest
import torch

from moe_router.dispatch.cost_model import (
    RATES,
    Link,
    Load,
    Problem,
    best,
    crossing_s,
    even_load,
    predict,
    seconds_by_rank,
)
from moe_router.dispatch.transports import NAMES

PROBLEM = Problem(tokens=4096, top_k=8, experts=256, ranks=2, dim=7168, itemsize=2)
FREE = dict.fromkeys(("gather", "combine", "plan"), float("inf"))


def link(ranks=2, fixed_s=(1e-4, 1e-5, 1e-5, 1e-5), **more):
    """300 GB/s to others, nothing but that costs; `more` gives other rates, or where ranks are."""
    rates = dict.fromkeys(RATES, 3e11) | FREE
    rates |= {name: more.pop(name) for name in list(more) if name in RATES}
    return Link(ranks, "cuda", rates, dict(zip(NAMES, fixed_s, strict=True)), **more)


def test_predictions_are_what_crosses_over_rates_behind_a_fixed_cost():
    took = predict(link(), PROBLEM)
    row, ids = 7168 * 2, 8 * 8
    both_ways = (2 * row + ids) / 3e11
    missed = 1.0
    for chosen in range(8):  # no choice among the 128 experts of the other rank
        missed *= (128 - chosen) / (256 - chosen)
    assert took["padded"] == pytest.approx(1e-5 + 4096 * both_ways)
    assert took["gather_scatter"] == pytest.approx(took["padded"])
    assert took["all_to_all"] == pytest.approx(1e-4 + 4096 * (1 - missed) * both_ways)
    # empty slots are written home, and not out
    empty = 4096 * missed
    out = (4096 - empty) * (row + ids) / 3e11
    assert took["peer_memory"] == pytest.approx(1e-5 + out + 4096 * row / 3e11)


def test_work_inside_a_rank_is_counted_by_its_own_rates():
    problem = Problem(tokens=10, top_k=1, experts=2, ranks=2, dim=4, itemsize=4)
    rows_WW = torch.tensor([[6.0, 4.0], [10.0, 0.0]], dtype=torch.float64)
    load = Load(rows_WW, torch.full((2, 2), 10.0, dtype=torch.float64))
    rates = {name: {name: 16.0} for name in ("gather", "combine")}  # a row a second
    took = {
        name: {
            n: s.tolist()
            for n, s in seconds_by_rank(link(fixed_s=(0.0,) * 4, **rate), problem, load).items()
        }
        for name, rate in rates.items()
    }
    seconds = {name: pytest.approx([10, 10], rel=1e-6) for name in NAMES}  # each token has one row
    seconds["gather_scatter"] = pytest.approx([0, 0], abs=1e-6)
    assert took["combine"] == seconds
    # rows into the message, and those of the own rank through it and back
    assert took["gather"]["all_to_all"] == pytest.approx([10 + 2 * 6, 10], rel=1e-6)
    assert took["gather"]["padded"] == pytest.approx([20 + 2 * 10] * 2, rel=1e-6)
    assert took["gather"]["peer_memory"] == pytest.approx([6 + 10, 10], rel=1e-6)
    assert took["gather"]["gather_scatter"] == pytest.approx([20, 20], rel=1e-6)
    # 4 bytes an id: laid out by the sender, sorted by the receiver
    by_ids = seconds_by_rank(link(fixed_s=(0.0,) * 4, plan=4.0), problem, load)
    assert by_ids["all_to_all"].tolist() == pytest.approx([10 + 16, 10 + 4], rel=1e-6)
    assert by_ids["gather_scatter"].tolist() == pytest.approx([20, 20], rel=1e-6)


def test_the_busier_direction_of_the_busiest_rank_counts():
    rows_WW = torch.tensor([[5.0, 1.0, 2.0], [4.0, 9.0, 0.0], [1.0, 1.0, 7.0]])
    seconds = crossing_s(link(3), rows_WW, 10, 10.0)
    assert seconds.tolist() == [5.0, 4.0, 2.0]


def test_other_machines_are_reached_by_their_own_link():
    """Four ranks, two a machine: one row each near, two far, both at once."""
    ones_WW = torch.ones(4, 4)
    pairs = {"per_node": 2, "far_bytes_per_s": 5.0}
    assert crossing_s(link(4, **pairs), ones_WW, 10, 10.0).tolist() == [4.0] * 4
    assert crossing_s(link(4, **pairs, message_s=0.5), ones_WW, 10, 10.0).tolist() == [5.0] * 4
    near_slow = crossing_s(link(4, **pairs), ones_WW, 10, 0.5)
    assert near_slow.tolist() == [20.0] * 4
    problem = Problem(tokens=8, top_k=2, experts=8, ranks=4, dim=4, itemsize=4)
    assert "peer_memory" in predict(link(4, per_node=4), problem)
    assert "peer_memory" not in predict(link(4, **pairs), problem)


def test_few_experts_a_token_make_host_splits_send_less():
    few = Problem(tokens=4096, top_k=1, experts=8, ranks=4, dim=4096, itemsize=4)
    took = predict(link(4, (0.0,) * 4), few)
    assert took["all_to_all"] < took["peer_memory"] < took["padded"] < took["gather_scatter"]


def test_the_choice_follows_the_number_of_ranks():
    """On two ranks nearly every token has a row on both, so a collective that sends all to all, and
    lays nothing out, is best; its bytes grow with W, those of the others with K at most."""
    costs = {"gather": 3e12, "combine": 3e12, "plan": 1e11, "put": 2e11}
    chosen, rows = [], []
    for ranks in (2, 4, 8, 16, 64):
        problem = Problem(8192, 8, 256, ranks, 4096, 4)
        fixed_s = (2e-4, 4e-5, 3e-5, 3e-5)
        chosen.append(best(predict(link(ranks, fixed_s, **costs), problem), problem))
        rows.append(float(even_load(problem, 2.0).rows_WW[0].sum()) / 8192)
    assert chosen[0] == "gather_scatter" and "gather_scatter" not in chosen[2:]
    # one row per (token, rank) where there would be one per (token, expert): 4 times fewer at two
    # ranks, hardly fewer at 64
    saved = [8 / per_token for per_token in rows]
    assert saved == sorted(saved, reverse=True)
    assert saved[0] == pytest.approx(4, rel=0.01) and 1 < saved[-1] < 1.1


def test_what_cannot_run_is_not_predicted_and_many_ranks_do_not_sum_in_16_bit():
    fast = {"all_gather": 1e15, "reduce_scatter": 1e15}
    four = {"tokens": 64, "top_k": 8, "experts": 64, "ranks": 4, "dim": 64}
    wide, narrow = Problem(**four, itemsize=4), Problem(**four, itemsize=2)
    level = link(4, (1e-4, 1e-5, 1e-5, 2e-5), **fast)
    assert best(predict(level, wide), wide) == "gather_scatter"
    assert best(predict(level, narrow), narrow) == "padded"
    without = Link(4, "cuda", level.bytes_per_s, {"all_to_all": 0.0})
    assert set(predict(without, wide)) == {"all_to_all"}
