"""The attention benchmark in a tiny form, on the CPU: what it computes, checks and writes down."""

import json

import pytest
import torch

from benchmarks import (
    attention,
    attention_cases,
    attention_decode,
    attention_table,
    attention_tiles,
    results,
)
from benchmarks.attention_cases import Case, Shape
from benchmarks.contest import WrongResult

CPU = torch.device("cpu")


@pytest.fixture
def saved(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "ROOT", tmp_path)

    def run(*arguments):
        attention.main([*arguments, "--heads", "4,2,16", "--save"])
        path = tmp_path / "results/attention.json"
        return {row["name"]: row for row in json.loads(path.read_text())}

    return run


def test_rows_stand_beside_the_fastest_dense_attention(saved, monkeypatch):
    monkeypatch.setattr(attention, "GROWTH", (256, 330))
    rows = saved("--tokens", "256,330")
    names = [
        attention.row_name(*of)
        for of in ((w, k, T) for w in attention.PASSES for k in attention.KINDS for T in (256, 330))
    ]
    assert set(rows) == {*names, "growth/top16/forward", "growth/top16/forward_backward"}
    for name in names:
        row = rows[name]
        assert row["correct"] and row["error"] < 1e-4 and row["best_peer"] == "flash", name
        assert row["ratio"] == pytest.approx(row["peer_value"] / row["value"], rel=1e-2, abs=1e-3)
        assert "RuntimeError" in row["peers"]["cudnn"]["reason"]  # it needs a GPU
        assert row["selection_us"] > 0
    assert rows["forward/top16/T330"]["share"] == 1.0  # there are six blocks


def test_a_wrong_result_is_a_line_and_costs_nobody_else_his(saved, monkeypatch):
    def error(self, kind, *, gradients):
        return 1.0 if kind == "top16" else 0.0

    monkeypatch.setattr(Case, "error", error)
    rows = saved("--tokens", "130", "--only", "forward/*")
    lost, found = rows["forward/top16/T130"], rows["forward/share30/T130"]
    assert lost["value"] is None and lost["reason"] == "WrongResult: error 1"
    assert found["value"] > 0 and found["correct"] and not lost["correct"]


def test_no_row_is_begun_after_the_time(saved, monkeypatch):
    with pytest.raises(FileNotFoundError):
        saved("--tokens", "128", "--seconds", "0")


def test_pairs_are_those_that_the_choice_computes():
    shape = Shape("top3", 330, 4, 2, 16)
    case = Case(shape, CPU)
    target = case.choose("top3").target_NJK
    first, last = case.blocks.first_N, case.blocks.last_N
    pairs = 0
    for n, chosen in enumerate(target[:, 0].tolist()):
        keys = torch.cat([torch.arange(first[m], last[m]) for m in chosen if m >= 0])
        pairs += sum(int((keys <= t).sum()) for t in range(int(first[n]), int(last[n])))
    assert shape.pairs == pairs
    for tokens in (4096, 32768, 65536):
        shape = Shape("share30", tokens)
        assert 0.3 <= shape.pairs / shape.dense_pairs < 0.33


@pytest.mark.parametrize("tokens", [1300, 2048])
def test_decoding_is_checked_against_the_chosen_keys(tokens, monkeypatch):
    row = attention_decode.measure_decode(tokens, 4, 2, 16, CPU)
    assert row["error"] < 1e-5 and row["value"] > 0 and row["peer_value"] > 0
    attend = attention_decode.attend_chosen_pages

    def wrong(*arguments):
        y, seen = attend(*arguments)
        return y * 1.1, seen

    monkeypatch.setattr(attention_decode, "attend_chosen_pages", wrong)
    with pytest.raises(WrongResult, match=r"error 0\.1"):
        attention_decode.measure_decode(tokens, 4, 2, 16, CPU)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_the_check_sees_an_error_in_output_and_gradients(place, monkeypatch):
    case = Case(Shape("top3", 330, 4, 2, 16), CPU)
    assert case.error("top3", gradients=True) < 1e-4
    backward = case.backward

    def wrong(out):
        grads = list(backward(out))
        grads[place][-5:] += 0.5
        return grads

    case.backward = wrong
    assert case.error("top3", gradients=True) > 0.05
    attend = attention_cases.attend_blocks
    monkeypatch.setattr(
        attention_cases, "attend_blocks", lambda *a, **more: attend(*a, **more) * 1.01
    )
    assert case.error("top3", gradients=False) > 5e-3


def test_tiles_are_rows_of_the_lengths_that_have_them():
    names = attention_tiles.tile_names(32768)
    assert len(names) == 9 and names[0] == "tiles/forward/wide/share30/T32768"
    assert attention_tiles.tile_names(1024) == []


def test_the_table_says_what_was_lost_and_what_was_not_timed():
    peers = {"flash": {"value": 9.0, "peak_mib": 3.0}, "cudnn": {"reason": "no GPU"}}
    lost = {
        "name": "forward/top16/T64", "value": 10.0, "share": 0.5, "tflops": 2.0,
        "selection_us": 1.0, "peak_mib": 4.0, "peers": peers, "best_peer": "flash",
        "peer_value": 9.0, "ratio": 0.9, "goal": None,
    }  # fmt: skip
    wrong = {"name": "forward/top16/T8", "value": None, "reason": "WrongResult: error 1"}
    cut = {"name": "tiles/keys/wide/share30/T32768", "value": 5.0, "cut": "Tile()", "best": True}
    growth = {"name": "growth/top16/forward", "value": 1.02, "between": [8, 64], "goal": 1.15}
    decode = {"name": "decode/top16/T8", "value": 2.0, "peer_value": 3.0}
    text = attention_table.table([lost, growth, cut, wrong, decode]).splitlines()
    assert text[-1] == (
        "- decode/top16/T8: 2.0 us a token, dense attention to the same pages 3.0 us"
    )
    assert text[2].startswith("| forward/top16/T8 | none: WrongResult: error 1 |")
    assert text[3].startswith("| forward/top16/T64 | 10.0 | 0.5 | 2.0 | 1.0 | 4.0 | flash | 9.0 |")
    assert "| **0.9** |  | cudnn no GPU |" in text[3]
    assert len({line.count("|") for line in text[:4]}) == 1
    assert text[7] == "| keys | wide: Tile() | 5.0 |  | yes |"
    assert text[-2].endswith("1.02 from 8 to 64 tokens (goal: at most 1.15)")
