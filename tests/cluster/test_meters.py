"""The dashboard asks for what the meters set, and a run sets it: read where Prometheus reads it."""

import io
import json
import re
import time
import urllib.request
from pathlib import Path

import pytest
import ray
from rich.console import Console

from moe_router.config import ClusterConfig
from moe_router.cost import cost, peak_flops
from moe_router.observability.records import EvalRecord, StepRecord
from moe_router_cluster import meters, session
from moe_router_cluster.course import Recovery
from moe_router_cluster.meters import Meters

pytestmark = pytest.mark.timeout(180)
DASHBOARD = Path(__file__).resolve().parents[2] / "cluster" / "dashboards" / "moe_router.json"
SERIES = re.compile(r"ray_moe_router_(\w+)")


@pytest.fixture(scope="module", autouse=True)
def ray_here():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_metrics_report_interval_ms", "500")  # ten seconds otherwise
        with session.ray_session(ClusterConfig()):
            yield


def scraped(run: str) -> dict[str, dict[str, float]]:
    """What this node offers of a run: name to its labels but the run, to the value."""
    port = ray.nodes()[0]["MetricsExportPort"]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    found: dict[str, dict[str, float]] = {}
    for name, labels, value in re.findall(r"^ray_moe_router_(\w+)\{(.*)\} (\S+)$", text, re.M):
        tags = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        if tags.get("run") == run:
            own = (k for k in ("layer", "expert", "loss") if k in tags)
            found.setdefault(name, {})[",".join(tags[k] for k in own)] = float(value)
    return found


def eventually(run: str, ready) -> dict[str, dict[str, float]]:
    """Ray hands metrics on now and then."""
    until = time.monotonic() + 40
    while not ready(found := scraped(run)):
        assert time.monotonic() < until, sorted(found)
        time.sleep(0.5)
    return found


def test_every_number_arrives_as_it_was_set(tiny):
    config = tiny(name="numbers")
    told = Meters(config, vocab=257, device="NVIDIA H100 80GB HBM3")
    record = StepRecord(
        step=7,
        loss=2.5,
        losses={"balance": 1.25},
        grad_norm=0.5,
        lr=1e-3,
        tokens=100,
        seconds=0.1,
        load_LE=[[3, 1], [2, 2]],
        rows=200,
        dropped=20,
        dispatch_us=12.0,
        dispatch_bytes=4096,
    )
    told.agreed(3, 5)
    told.stepped([record, record], seconds=0.5)
    told.evaluated(EvalRecord(7, 3.5, 10))
    told.recovered(Recovery([1], [0, 1], False, 7, 5, 4.0, 2, "actor 1 died"))
    found = eventually("numbers", lambda found: "recovery_seconds_total" in found)
    mfu = 400 * 3 * cost(config, 257).flops / (2 * 989e12)
    for name, value in {
        "step": 5,
        "epoch": 3,
        "loss": 2.5,
        "grad_norm": 0.5,
        "held_out_loss": 3.5,
        "tokens_per_second": 400,
        "mfu": mfu,
        "dispatch_microseconds": 12,
        "dispatch_bytes": 4096,
        "tokens_total": 200,
        "rows_total": 400,
        "dropped_total": 40,
        "recoveries_total": 1,
        "recovery_seconds_total": 4,
    }.items():
        assert found[name] == {"": pytest.approx(value)}, name
    assert found["expert_rows"] == {"0,0": 3, "0,1": 1, "1,0": 2, "1,1": 2}
    assert found["imbalance"] == {"0": 1.5, "1": 1.0}
    assert found["routing_loss"] == {"balance": 1.25}


def test_the_dashboard_asks_for_all_of_it_and_nothing_else():
    panels = json.loads(DASHBOARD.read_text())["panels"]
    asked = {name for p in panels for t in p["targets"] for name in SERIES.findall(t["expr"])}
    known = set(meters.GAUGES) | set(meters.BY_LAYER) | set(meters.BY_EXPERT) | set(meters.BY_LOSS)
    known |= {f"{name}_total" for name in meters.COUNTERS}
    assert asked == known


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("cpu", None),
        ("NVIDIA GeForce GTX 750", None),
    ],
)
def test_a_peak_is_known_or_is_not_claimed(device, peak):
    assert peak_flops(device) == peak


def test_a_run_tells_prometheus_and_its_logs(tiny):
    from moe_router_cluster.train import train

    config = tiny(name="metered")
    out = io.StringIO()
    assert train(config, Console(file=out, width=200), kill="1@7"), out.getvalue()
    last = {"step": {"": 12.0}, "epoch": {"": 5.0}}  # each is told when it comes
    found = eventually("metered", lambda found: last.items() <= found.items())
    assert found["recoveries_total"] == {"": 1.0} and "mfu" not in found
    assert found["tokens_total"] == {"": 14 * 4 * 32}  # steps 6 and 7 twice
    assert sum(found["expert_rows"].values()) == 2 * 4 * 32 * 2  # layers, rows, tokens, top_k
    assert found["dispatch_microseconds"][""] > 0 and found["dispatch_bytes"][""] > 0

    logs = Path(config.run.dir) / config.run.name / "logs"
    lines = [json.loads(line) for line in (logs / "run.jsonl").read_text().splitlines()]
    assert " ".join(line["event"] for line in lines) == (
        "started epoch epoch recovered epoch epoch epoch evaluated finished"
    )
    (recovered,) = [line for line in lines if line["event"] == "recovered"]
    assert (recovered["step"], recovered["lost_at"], recovered["actors"]) == (5, 7, [1])
    assert [line["epoch"] for line in lines] == [0, 1, 2, 2, 3, 4, 5, 5, 5]
    ranks = [
        [json.loads(line) for line in (logs / f"rank_{rank}.jsonl").read_text().splitlines()]
        for rank in (0, 1)
    ]
    assert [line["generation"] for line in ranks[1] if line["event"] == "restored"] == [1, 2]
    lost = [line for line in ranks[0] if line["event"] == "peer lost"]
    assert lost and lost[0]["generation"] == 1 and lost[0]["rank"] == 0
    assert {line["step"] for line in ranks[0] if line["event"] == "checkpoint"} == {5, 10, 12}
