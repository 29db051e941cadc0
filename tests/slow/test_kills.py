"""Ranks that die in turn, again and again: nothing of them is left, and no trace in the weights."""

import pytest

from benchmarks import kills

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_nothing_is_left_of_the_dead_and_a_stopped_command_goes_on(tmp_path):
    assert kills.measure(12, 10.0, tmp_path) is None
    row = kills.measure(12, 300.0, tmp_path)
    assert row["correct"] and (row["value"], row["commands"]) == (12, 2), row
