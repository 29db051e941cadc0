"""/metrics over a real server, read by Prometheus' own parser."""

import pytest

from moe_router.serving.meters import COUNTERS, GAUGES, HISTOGRAMS, Meters
from tests.serving.web import call, complete, served

parser = pytest.importorskip("prometheus_client.parser")


def read(text):
    """Values by name and labels."""
    families = parser.text_string_to_metric_families(text)
    return {
        (sample.name.removeprefix("moe_router_serving_"), *sample.labels.values()): sample.value
        for family in families
        for sample in family.samples
    }


def test_what_was_served_is_counted():
    with served(slots=2) as (port, _):
        for n in (5, 3):
            assert complete(port, "The ", max_tokens=n, temperature=0)[0] == 200
        status, text, headers = call(port, "GET", "/metrics")
    assert status == 200 and headers["content-type"].startswith("text/plain; version=0.0.4")
    found = read(text)
    assert found["prompt_tokens_total",] == 10 and found["generation_tokens_total",] == 8
    assert found["requests_total", "length"] == 2 and found["requests_total", "abandoned"] == 0
    assert found["time_to_first_token_seconds_count",] == 2
    assert found["time_per_output_token_seconds_count",] == 6
    assert found["queue_seconds_bucket", "+Inf"] == 2
    assert found["time_to_first_token_seconds_sum",] >= found["queue_seconds_sum",] > 0
    assert (found["running",], found["waiting",], found["cache_use",]) == (0, 0, 0)
    assert found["healthy",] == 1


def test_metrics_want_the_token():
    with served(token="secret") as (port, _):
        assert call(port, "GET", "/metrics")[0] == 401
        allowed = {"Authorization": "Bearer secret"}
        assert call(port, "GET", "/metrics", headers=allowed)[0] == 200


def test_a_histogram_counts_what_is_not_more_than_each_bound():
    meters = Meters()
    for seconds in (0.001, 0.0011, 0.2, 100.0):
        meters.seconds["queue_seconds"].add(seconds)
    found = read(meters.text(dict.fromkeys(GAUGES, 0.5)))
    buckets = [found["queue_seconds_bucket", bound] for bound in ("0.001", "0.0025", "60.0")]
    assert buckets == [1, 2, 3] and found["queue_seconds_bucket", "+Inf"] == 4
    assert found["queue_seconds_sum",] == pytest.approx(100.2021, rel=1e-5)
    names = {name for name, *_ in found}
    assert {*COUNTERS, *GAUGES, "requests_total"} <= names
    assert all(f"{name}_count" in names for name in HISTOGRAMS)
