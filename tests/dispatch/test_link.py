"""The link is measured the same on all ranks, and the chooser takes what it predicts to be best."""

import logging

import pytest
import torch

from moe_router.dispatch.link import RATES, Link, Problem, choose, measure, predict
from moe_router.dispatch.transports import NAMES
from tests.gloo import run_ranks

PROBLEM = Problem(tokens=4096, top_k=8, experts=256, ranks=2, dim=7168, itemsize=2)


def link(fixed_s=(1e-4, 1e-5, 1e-5), **rates):
    """300 GB/s for all, but what is given."""
    bytes_per_s = dict.fromkeys(RATES, 3e11) | {"gather": 1e13, "plan": 1e13} | rates
    return Link(2, "cuda", bytes_per_s, dict(zip(NAMES, fixed_s, strict=True)))


def measured(rank, ranks):
    found = measure(torch.device("cpu"), times=1)
    return found.ranks, found.device, found.bytes_per_s, found.fixed_s


def test_all_ranks_measure_the_same_numbers():
    first, second = run_ranks(2, measured)
    assert first == second and first[:2] == (2, "cpu")
    assert set(first[2]) == set(RATES) and set(first[3]) == set(NAMES)
    assert all(number > 0 for part in first[2:] for number in part.values())


def test_predictions_are_bytes_over_rates_behind_a_fixed_cost():
    free = {"gather": float("inf"), "plan": float("inf")}
    took = predict(link(**free), PROBLEM)
    row, ids = 7168 * 2, 8 * 8
    # nearly every token has an expert on both ranks, so exact rows are nearly all rows
    assert took["padded"] == pytest.approx(1e-5 + 2 * 4096 * (2 * row + ids) / 3e11)
    assert took["gather_scatter"] == pytest.approx(took["padded"])
    sent = (
        2
        * 4096
        * (
            1
            - 128
            / 256
            * 127
            / 255
            * 126
            / 254
            * 125
            / 253
            * 124
            / 252
            * 123
            / 251
            * 122
            / 250
            * 121
            / 249
        )
    )
    assert took["all_to_all"] == pytest.approx(1e-4 + sent * (2 * row + ids) / 3e11)


@pytest.mark.parametrize(
    "fixed_s, rates, best",
    [
        ((1e-4, 1e-5, 1e-5), {"all_gather": 4e11}, "gather_scatter"),
        ((1e-4, 1e-5, 1e-5), {"reduce_scatter": 1e11}, "padded"),
        ((0.0, 1e-3, 1e-3), {}, "all_to_all"),
    ],
)
def test_the_best_prediction_is_taken_and_the_log_says_why(fixed_s, rates, best, caplog):
    with caplog.at_level(logging.INFO):
        assert choose(link(fixed_s, **rates), PROBLEM) == best
    (said,) = caplog.messages
    start = (
        f"transport {best} for 4096x7168, top-8 of 256, 16 bit on 2 ranks; predicted: all_to_all "
    )
    assert said.startswith(start) and all(name in said for name in NAMES)


def test_few_experts_a_token_make_host_splits_send_less():
    few = Problem(tokens=4096, top_k=1, experts=8, ranks=4, dim=4096, itemsize=4)
    took = predict(link((0.0, 0.0, 0.0)), few)
    assert took["all_to_all"] < took["padded"] < took["gather_scatter"]


def test_many_ranks_do_not_sum_in_16_bit(caplog):
    fast_sums = link(reduce_scatter=1e15, all_gather=1e15)
    four = {"tokens": 64, "top_k": 8, "experts": 64, "ranks": 4, "dim": 64}
    assert choose(fast_sums, Problem(**four, itemsize=4)) == "gather_scatter"
    assert choose(fast_sums, Problem(**four, itemsize=2)) == "padded"
