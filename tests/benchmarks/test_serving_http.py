"""The rows of `benchmarks.serving_http`."""

import itertools
import time

import pytest

from benchmarks.serving_answers import Answers, spread
from benchmarks.serving_cases import CASES
from benchmarks.serving_http import measure


def test_tokens_that_come_together_count_as_evenly_spread():
    times = []
    spread(times, 1)
    (first,) = times
    time.sleep(0.02)
    spread(times, 4)
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert times[0] == first and len(times) == 5
    assert gaps == pytest.approx([gaps[0]] * 4, rel=1e-6) and sum(gaps) >= 0.02
    rate, slow = Answers([], first, [times]).decode()
    assert rate == pytest.approx(1 / gaps[0], rel=1e-6) and slow == pytest.approx(gaps[0], rel=1e-6)


@pytest.mark.slow
def test_a_row_compares_http_with_the_engine_and_their_texts():
    row = measure("http/streams3", CASES["tiny"], streams=3, rounds=1, together_s=0.0)
    assert row["correct"] and row["value"] > 0 and row["engine"] > 0
    assert 0 < row["cpu_share"] < 1.5
