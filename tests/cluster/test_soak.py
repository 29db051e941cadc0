"""A minute of `benchmarks.soak`: under too much load, with a killed shard and a redeploy, nobody is
left without an answer or a reason, and every answer is that of `generate`."""

import pytest

from benchmarks.soak import run_soak, summary
from benchmarks.soak_clients import Outcome

SAMPLES = [(float(second), 1000.0) for second in range(600)]


def outcome(kind, way="stream", **more):
    return Outcome(way, kind, 200, first_s=0.1, total_s=0.2, **more)


def test_a_lost_or_a_wrong_answer_is_seen_and_who_hung_up_is_not_counted():
    good = [outcome("answered")] * 8 + [outcome("refused"), outcome("vanished", "vanish")]
    row = summary(good, SAMPLES, 600)
    assert (row["value"], row["correct"], row["flat"]) == (1.0, True, True)
    assert summary([*good, outcome("lost", reason="cut")], SAMPLES, 600)["value"] == 0.9
    for kind in ("lost", "wrong"):
        row = summary([*good, outcome(kind, reason="cut")], SAMPLES, 600)
        assert not row["correct"] and row["losses"] == {"stream: cut": 1}
    grown = [(at, 1000.0 if at < 480 else 1200.0) for at, _ in SAMPLES]
    row = summary(good, grown, 600)
    assert (row["flat"], row["correct"]) == (False, False)


@pytest.mark.slow
@pytest.mark.timeout(590)
def test_a_minute_of_everything_going_wrong():
    row = run_soak(minutes=1.0, factor=1.2)
    assert row["correct"], row["losses"]
    assert row["value"] == 1.0 and row["failures"] == []
    assert row["answered"] > 100 and row["vanished"] > 0 and row["refused"] > 0
