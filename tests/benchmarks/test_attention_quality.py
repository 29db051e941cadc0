"""Recall and text by routed attention and its controls, in a tiny form, on the CPU."""

import json

import pytest
import torch

from benchmarks import (
    attention_learner,
    attention_quality,
    attention_recall,
    attention_table,
    by_seed,
    results,
)
from benchmarks.attention_controls import NAMES, attention_config, linear_attention, make_model
from benchmarks.attention_learner import NONE, Learner
from benchmarks.attention_recall import Task
from moe_router import Context, Ledger
from moe_router.models.rope import rotate, turn_at

SIZES = {"layers": 1, "dim": 16, "heads": 4, "kv_heads": 2, "hidden": 16}
CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "ROOT", tmp_path)
    for module in (attention_quality, attention_recall):
        monkeypatch.setattr(module, "SIZES", SIZES)
    return tmp_path / "results/attention_quality.json"


def test_a_passage_comes_again_and_counts_after_its_cue():
    task = Task(64, 3, passage=8, vocab=50)
    ids, target = task.batch(torch.Generator().manual_seed(0))
    first, second = ids[:, :32].view(3, 4, 8), ids[:, 32:].view(3, 4, 8)
    for row in range(3):
        assert sorted(first[row].tolist()) == sorted(second[row].tolist())
    assert not torch.equal(first, second)
    wanted = torch.full_like(ids, NONE)
    for at in range(32, 64):
        if at % 8 >= attention_recall.CUE:
            wanted[:, at - 1] = ids[:, at]
    assert torch.equal(target, wanted)


def test_linear_attention_is_its_sum():
    T, H, C, length = 40, 2, 8, 20
    q, k, v = (torch.rand(T, H, C).double() + 0.1 for _ in range(3))
    place = torch.arange(length).repeat(2)
    turn = turn_at(place, C, 10000.0)
    turned_q, turned_k = rotate(q, turn).double(), rotate(k, turn).double()
    import benchmarks.attention_controls as controls

    for chunk in (5, 20):
        controls.CHUNK = chunk
        got = linear_attention(q, k, v, turn, length)
        for t in range(T):
            seen = range(t - t % length, t + 1)
            top = sum((turned_q[t] * turned_k[s]).sum(-1, keepdim=True) * v[s] for s in seen)
            low = sum((q[t] * k[s]).sum(-1, keepdim=True) for s in seen)
            torch.testing.assert_close(got[t], top / low, rtol=1e-5, atol=1e-6)
    controls.CHUNK = 64


def test_controls_see_as_many_pairs_as_ours():
    ids, position = torch.arange(640) % 50, torch.arange(640, dtype=torch.int32)
    executed = {}
    for name in NAMES:
        how = attention_config(name, 640, 16, 1)
        assert (how is None) == (name in ("dense", "linear"))
        if how is None:
            continue
        ledger = Ledger()
        model = make_model(name, SIZES, 640, 16, 1, 50, 0).eval()
        with torch.no_grad():
            model(ids, position, torch.tensor([0, 640]), context=Context(ledger=ledger))
        project = 640 * (2 * (2 * 16 * 16 + 2 * 16 * 8))
        executed[name] = (ledger.by_op()["attention"][0] - project) / (4 * 16 * 640 * 641 // 2)
    for name in ("ours", "window", "random", "fixed", "ours, modulated"):
        # and in so small a model the choice itself shows
        assert 0.3 < executed[name] < 0.35, name
    assert 0.2 < executed["clusters"] < 0.6


@pytest.mark.parametrize("name", NAMES)
def test_no_variant_looks_ahead_and_each_learns(name):
    model = make_model(name, SIZES, 64, 16, 1, 20, 0)
    learner = Learner(model, 2, 64, lr=0.03, device=CPU)
    task = Task(64, 2, 16, 20)
    batch = task.batch(torch.Generator().manual_seed(0))
    batch = (batch[0], torch.cat([batch[0][:, 1:], batch[0][:, :1]], 1))
    learner.read(batch)
    with torch.no_grad():
        before = learner.logits()
        learner.ids_RN[:, 40:] = (learner.ids_RN[:, 40:] + 1) % 20
        after = learner.logits()
    torch.testing.assert_close(after[:, :40], before[:, :40])
    assert not torch.allclose(after[:, 40:], before[:, 40:])
    learner.train(lambda _: batch, 12, 2)
    loss, accuracy = learner.held_out(1, lambda _: batch)
    assert loss < 2.9 and accuracy > 0.08  # log 20 is 3.0


@pytest.mark.parametrize("name", ["ours", "clusters", "linear"])
def test_training_begins_dense_but_for_linear_attention(name):
    learner = Learner(make_model(name, SIZES, 64, 16, 1, 20, 0), 2, 64, lr=0.01, device=CPU)
    attention, seen = learner.model.blocks[0].attention, []
    task, generator = Task(64, 2, 16, 20), torch.Generator().manual_seed(0)

    def batch(step):
        seen.append(attention.routed is None)
        return task.batch(generator)

    learner.train(batch, 4, 1, 2)
    assert seen == [name != "linear"] * 2 + [False] * 2


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_a_step_is_one_graph_that_learns_as_its_launches_do(name, monkeypatch):
    task, losses, capture = Task(256, 2, 32, 50), [], attention_learner.capture
    monkeypatch.setattr(attention_learner, "tell", pytest.fail)  # it tells why there is no graph
    for way in (capture, lambda run: (run(), run)[1]):
        monkeypatch.setattr(attention_learner, "capture", way)
        model = make_model(name, SIZES | {"dim": 64}, 256, 16, 1, 50, 0)
        learner = Learner(model, 2, 256, lr=0.01, device=torch.device("cuda"))
        generator = torch.Generator().manual_seed(0)
        learner.train(lambda _, g=generator: task.batch(g), 20, 2, 5)
        losses.append(float(learner.loss))
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_a_run_that_was_cut_goes_on(folder, tmp_path, capsys):
    text = tmp_path / "text"
    text.write_bytes(bytes(range(200)) * 40)
    how = ["--data", str(text), "--tokens", "64", "--batch", "2", "--held-out", "1"]
    how += ["--steps", "2", "--only", "dense;ours", "--save"]
    attention_quality.main([*how, "--seconds", "0"])
    assert not folder.exists()
    attention_quality.main([*how, "--seeds", "1"])
    first = {row["name"]: row for row in json.loads(folder.read_text())}
    assert first["enwik8/ours"]["std"] is None and 6 < first["enwik8/dense"]["value"] < 9
    assert first["enwik8/dense"]["share_of_flops"] is None
    assert 0 < first["enwik8/ours"]["share_of_flops"] <= 1
    capsys.readouterr()
    attention_quality.main([*how, "--seeds", "2"])
    said = capsys.readouterr().out
    assert "seed 0" not in said and said.count("seed 1") == 2
    rows = {row["name"]: row for row in json.loads(folder.read_text())}
    for name, row in rows.items():
        assert row["by_seed"]["0"] == first[name]["by_seed"]["0"] and row["std"] >= 0
    attention_quality.main([*how, "--seeds", "1", "--steps", "3"])  # another setting: anew
    rows = {row["name"]: row for row in json.loads(folder.read_text())}
    assert list(rows["enwik8/ours"]["by_seed"]) == ["0"] and rows["enwik8/ours"]["steps"] == 3


def test_recall_is_saved_beside_it(folder):
    attention_recall.main([
        "--tokens", "64,128", "--batch", "128", "--passage", "16", "--steps", "1", "--seeds", "1",
        "--only", "clusters;fixed", "--save",
    ])  # fmt: skip
    rows = {row["name"]: row for row in json.loads(folder.read_text())}
    names = [f"recall/T{n}/{name}" for n in (64, 128) for name in ("clusters", "fixed")]
    assert sorted(rows) == sorted(names)
    assert all(0 <= row["value"] < 0.2 for row in rows.values())
    assert rows["recall/T128/fixed"]["rows"] == 1 and rows["recall/T64/fixed"]["rows"] == 2


def test_the_table_says_what_is_kept_and_who_is_ahead(folder):
    rows = {}
    setting = {"steps": 9, "unit": "bits per byte"}
    for name, values in {"dense": (2.0, 2.0), "ours": (2.1, 2.1), "window": (2.2, 2.4)}.items():
        for seed, value in enumerate(values):
            where = (by_seed, "attention_quality", rows, f"enwik8/{name}", seed, value)
            where[0].add(*where[1:], {"device": "a GPU"}, setting)
    lines = attention_table.quality(json.loads(folder.read_text())).splitlines()
    assert lines[0] == "a GPU, 9 steps:"
    assert lines[2].startswith("| enwik8, bits per byte | mean | std |")
    assert lines[4].startswith("| dense | 2.0 | 0.0 | 2.0, 2.0 | 1.0 | -")
    assert lines[6] == "| window | 2.3 | 0.14142 | 2.2, 2.4 | 0.8696 | 2.0 std |"
