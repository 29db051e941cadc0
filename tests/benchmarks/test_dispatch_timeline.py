"""The timeline of a layer whose shared expert runs while rows travel, on real ranks over gloo."""

import json

import pytest
import torch

from benchmarks import dispatch, dispatch_timeline
from moe_router.dispatch.transports import NAMES
from tests.gloo import run_ranks


def recorded(rank, ranks, *args):
    dispatch_timeline.record(torch.device("cpu"), *args)


def run_here(ranks, kind, function, *args):
    assert kind == "cpu" and function is dispatch_timeline.record
    run_ranks(ranks, recorded, *args)


def test_the_shared_expert_runs_while_rows_travel(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(dispatch, "local_device", lambda ranks: "cpu")
    monkeypatch.setattr(dispatch_timeline, "run_here", run_here)
    file = tmp_path / "trace.json"
    dispatch.main(["--layer", "64,32,16,8,2", "--timeline", str(file)])
    events = json.loads(file.read_text())["traceEvents"]
    names = {e["args"]["name"] for e in events if e.get("name") == "process_name"}
    assert {name.split(":")[0] for name in names} == {"rank 0", "rank 1"}
    found = list(dispatch_timeline.overlaps(events))
    assert len(found) == 2 * len(NAMES) * 2
    for said in found:
        # all of it, but for what the hooks themselves take
        assert said["shared_us"] > 0, said
        assert said["meanwhile_us"] == pytest.approx(said["shared_us"], rel=1e-6), said
        assert said["travel_us"] >= said["meanwhile_us"], said
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if "between departure and arrival" in line]) == 8


def span(name, cat, ts, dur):
    return {"ph": "X", "rank": 0, "name": name, "cat": cat, "ts": ts, "dur": dur}


def test_what_does_not_overlap_is_not_counted():
    """Twice 10 us of the shared expert, the first half of it before rows left; on the device, 8 us
    of a put of which a product runs beside 5, 2 and 3 us by two kernels."""
    steps = [
        span("Send", "cpu_op", 5, 2), span("shared expert", "user_annotation", 0, 10),
        span("_Arrive", "cpu_op", 20, 1),
        span("_ArriveBackward", "cpu_op", 30, 1),
        span("shared expert, backward", "user_annotation", 35, 10),
        span("SendBackward", "cpu_op", 40, 1),
        span("_put_kernel", "kernel", 6, 8), span("gemm", "kernel", 4, 4),
        span("gemm", "kernel", 11, 9),
    ]  # fmt: skip
    events = []
    for n, name in enumerate(NAMES):
        events += [span(name, "user_annotation", 1000 * n, 100)]
        events += [step | {"ts": step["ts"] + 1000 * n} for step in steps]
    found = [f for f in dispatch_timeline.overlaps(events) if f["transport"] == "padded"]
    forward, backward = found
    assert (forward["shared_us"], forward["meanwhile_us"], forward["travel_us"]) == (10, 5, 15)
    assert (backward["shared_us"], backward["meanwhile_us"], backward["travel_us"]) == (10, 5, 10)
    assert (forward["link_us"], forward["link_beside_others_us"]) == (8, 5)
