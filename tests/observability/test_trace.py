import csv

import pytest
import torch

from moe_router import Context, MoE, MoEConfig
from moe_router.errors import DataError, MoeRouterError
from moe_router.observability.trace import Recorder, export_csv, load_trace


def moe(**config):
    torch.manual_seed(0)
    return MoE(16, MoEConfig(experts=4, top_k=2, hidden=8, **config))


def test_what_the_layer_decided_comes_back_from_the_file(tmp_path):
    layer = moe(capacity_factor=0.5)
    recorder = Recorder(tmp_path / "routing" / "step.safetensors")
    ids_T = torch.arange(10) + 60
    recorder.begin(ids_T, torch.arange(10), first_token=100)
    routed = layer(torch.randn(10, 16), Context(observe=recorder))
    trace = load_trace(recorder.save())
    held = trace.layers[0]
    assert torch.equal(held.target_TK, routed.choice.target_TK)
    assert torch.equal(held.weight_TK, routed.choice.weight_TK)
    assert torch.equal(held.kept_TK, routed.plan.row_TK >= 0) and not held.kept_TK.all()
    assert trace.token_T.tolist() == list(range(100, 110)) and torch.equal(trace.ids_T, ids_T)


def test_passes_follow_one_another(tmp_path):
    layer = moe()
    recorder = Recorder(tmp_path / "sample.safetensors")
    for size in (5, 1, 1):  # a prompt, then a token at a time
        layer(torch.randn(size, 16), Context(observe=recorder))
    recorder.label(torch.arange(8))
    trace = load_trace(recorder.save())
    assert trace.layers[0].target_TK.shape == (7, 2) and trace.ids_T.tolist() == list(range(7))


def test_rows_and_csv_say_token_layer_groups_weights_drops(tmp_path):
    layer = moe(capacity_factor=0.5)
    recorder = Recorder(tmp_path / "step.safetensors")
    recorder.begin(torch.arange(6), torch.arange(6))
    routed = layer(torch.randn(6, 16), Context(observe=recorder))
    rows = list(recorder.trace().rows())
    assert [row.token for row in rows] == list(range(6))
    assert [list(row.groups) for row in rows] == routed.choice.target_TK.tolist()
    assert [list(row.drops) for row in rows] == (routed.plan.row_TK < 0).tolist()
    path = export_csv(recorder.trace(), tmp_path / "step.csv")
    table = list(csv.DictReader(path.read_text().splitlines()))
    assert len(table) >= 6 and {"token", "layer"} <= table[0].keys()


def test_a_pass_that_was_not_begun_is_refused():
    layer, recorder = moe(), Recorder("unused.safetensors")
    recorder.begin(torch.arange(4), torch.arange(4))
    with pytest.raises(MoeRouterError, match=r"layer 0: got 5 tokens in pass 1, want 4 in pass 1"):
        layer(torch.randn(5, 16), Context(observe=recorder))


def test_a_file_that_is_no_trace_is_refused_by_name(tmp_path):
    path = tmp_path / "step.safetensors"
    path.write_bytes(b"not a trace")
    with pytest.raises(DataError, match=r"step\.safetensors"):
        load_trace(path)
