"""The link is measured the same on all ranks; what it predicts is compared with what then runs."""

import logging
import platform
import time
from unittest import mock

import pytest
import torch

from moe_router.dispatch import link
from moe_router.dispatch.cost_model import RATES, Link, Problem, predict
from moe_router.dispatch.link import choose, measure, measure_transports, peer_mover
from moe_router.dispatch.transports import NAMES
from tests.gloo import run_ranks

CPU = torch.device("cpu")


def measured(rank, ranks):
    found = measure(CPU, times=1)
    return found.ranks, found.device, found.bytes_per_s, found.fixed_s


def test_all_ranks_measure_the_same_numbers():
    first, second = run_ranks(2, measured)
    assert first == second and first[:2] == (2, "cpu")
    assert set(first[2]) == set(RATES) and set(first[3]) == set(NAMES)
    assert all(number > 0 for part in first[2:] for number in part.values())


def compared(rank, ranks):
    """Predicted and measured seconds. Of the processor: other processes may share it."""
    problem = Problem(tokens=1024, top_k=4, experts=32, ranks=ranks, dim=512, itemsize=4)
    how = {"times": 5, "clock": time.process_time}
    predicted = predict(measure(CPU, **how), problem)
    return predicted, measure_transports(problem, CPU, **how)


def assert_predicted(ranks, within):
    predicted, took = run_ranks(ranks, compared)[0]
    for name in NAMES:
        assert 1 / within < predicted[name] / took[name] < within, (name, predicted, took)
    return predicted, took


def test_predictions_are_near_what_then_runs():
    """A shared CPU is no stopwatch: within 3 times. What is counted is held by test_cost_model."""
    assert_predicted(2, 3)


@pytest.mark.slow
def test_predictions_follow_the_number_of_ranks():
    """Sending everything to all costs more than the rows that must go, the more ranks there are."""
    assert_predicted(4, 3)
    predicted, took = assert_predicted(8, 3)
    assert predicted["all_to_all"] < predicted["gather_scatter"]
    assert took["all_to_all"] < took["gather_scatter"]


@pytest.mark.parametrize(
    "fixed_s, rates, best",
    [
        ((1e-4, 1e-5, 1e-5, 1e-4), {"all_gather": 4e11}, "gather_scatter"),
        ((1e-4, 1e-5, 1e-5, 1e-4), {"reduce_scatter": 1e11}, "padded"),
        ((0.0, 1e-3, 1e-3, 1e-3), {}, "all_to_all"),
        ((1e-4, 1e-5, 1e-5, 1e-5), {"put": 4e11}, "peer_memory"),
    ],
)
def test_the_best_prediction_is_taken_and_the_log_says_why(fixed_s, rates, best, caplog):
    fast = dict.fromkeys(RATES, 3e11) | dict.fromkeys(("gather", "combine", "plan"), 1e14)
    found = Link(2, "cuda", fast | rates, dict(zip(NAMES, fixed_s, strict=True)))
    with caplog.at_level(logging.INFO):
        assert choose(found, Problem(4096, 8, 256, 2, 7168, 2)) == best
    (said,) = caplog.messages
    start = f"transport {best} for 4096x7168, top-8 of 256, 16 bit on 2 ranks, where a token has "
    assert said.startswith(start + "1.99 rows; predicted: all_to_all ")
    assert all(name in said for name in NAMES)


def apart(rank, ranks, name, said):
    """Whether ranks whose platform says so may write into each other's memory; what is logged."""
    logged = []
    with (
        mock.patch.object(platform, name, lambda: said[rank]),
        mock.patch.object(link._log, "info", lambda text, *about: logged.append(text % about)),
    ):
        return peer_mover(CPU) is not None, logged


def test_memory_out_of_reach_is_nobodys_to_write_into():
    far = ["no peer_memory: the ranks are on several machines"]
    assert run_ranks(2, apart, "node", ("one", "two")) == [(False, far)] * 2
    assert run_ranks(2, apart, "node", ("one", "one")) == [(True, [])] * 2
    for reached, (said,) in run_ranks(2, apart, "machine", ("arm64", "arm64")):
        start = "no peer_memory: cluster.transport=peer_memory on a CPU of kind arm64: want one"
        assert not reached and said.startswith(start)
