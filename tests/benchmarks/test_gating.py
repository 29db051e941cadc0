"""The gating benchmark with few calls: real clients, a real server, rows that are checked."""

import json
import sys
from contextlib import nullcontext

import grpc
import pytest
import torch

from benchmarks import gating, results
from benchmarks.gating_server import serving
from moe_router.serving.router_pb2_grpc import RouterStub


@pytest.fixture(scope="module")
def server():
    with serving(experts=gating.EXPERTS, dim=gating.DIM, token=gating.TOKEN) as made:
        yield made


def test_rows_say_how_long_clients_wait(server, monkeypatch, tmp_path):
    monkeypatch.setattr(gating, "serving", lambda **options: nullcontext(server))
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(gating, "_WARM", 8)
    monkeypatch.setattr(sys, "argv", ["gating", "--calls", "40", "--only", "grpc/*T1*", "--save"])
    gating.main()
    rows = json.loads((tmp_path / "results" / "gating.json").read_text())
    names = ["grpc/route/T1", "grpc/route/T1/8 at once", "grpc/route/T1/200 streams"]
    assert [row["name"] for row in rows] == names
    for row in rows:
        assert row["correct"] and row["calls"] == 40 and row["unit"] == "us"
        assert 0 < row["value"] <= row["p90"] <= row["p99"]
        assert row["calls_per_s"] > 0 and all(mib > 50 for mib in row["server_mib"])


def test_a_wrong_answer_is_seen(server, monkeypatch):
    case = gating.Case("grpc/route/T3", 3)
    with grpc.insecure_channel(server.address) as channel:
        stub = RouterStub(channel)
        ask, correct = gating.prepare(case, stub)
        assert correct and ask().epoch == 1
        monkeypatch.setattr(gating, "from_matrix", lambda matrix, name: torch.zeros(3, 2).int())
        assert gating.prepare(case, stub)[1] is False


def test_parts_of_a_sample():
    values = [float(i) for i in range(100)]
    assert gating._part(values, 0.9) == 90.0 and gating._part(values, 0.99) == 99.0
    assert gating._part([3.0], 0.99) == 3.0
    with pytest.raises(IndexError):
        gating._part([], 0.5)
