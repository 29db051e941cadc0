"""The Hugging Face table in its tiny form: every row of it; a wrong contender is refused."""

import json

import pytest
import torch

pytest.importorskip("transformers")
from benchmarks import huggingface, results
from benchmarks.contest import OURS, Field
from benchmarks.huggingface_models import check, small_model
from benchmarks.peers.base import Call, Peer


def test_every_row_of_the_tiny_table(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "ROOT", tmp_path)
    made = list(huggingface.rows("tiny", ["*"], rounds=1))
    wanted = [huggingface.name_of(*case[:3]) for case in huggingface.cases("tiny")]
    assert [row["name"] for row in made] == wanted
    assert len(set(wanted)) == 10 + 3 * torch.cuda.is_available()
    for row in made:
        assert row["correct"] and row["value"] > 0 and row["error"] < 1e-2, row
        assert {"eager", "batched_mm", "grouped_mm"} <= row["peers"].keys()
        assert row["peers"]["eager"]["value"] > 0
        assert all("value" in peer or peer["reason"] for peer in row["peers"].values())
        assert row["ratio"] == pytest.approx(row["peer_value"] / row["value"], abs=1e-3)
    assert json.loads(results.save("huggingface", made).read_text()) == made


def test_no_row_is_begun_when_the_seconds_are_over(capsys):
    assert list(huggingface.rows("tiny", ["*/mixtral/*"], rounds=1, seconds=-1.0)) == []
    assert "prefill/mixtral/T64: not begun" in capsys.readouterr().err


def test_what_cannot_be_captured_says_so_before_it_is_tried(monkeypatch):
    """On a GPU a failed capture leaves the default generator unusable."""
    monkeypatch.setattr(huggingface, "capture", lambda run: run)
    of = Field({name: peer for name, peer in huggingface.line_up().items() if name != "sonicmoe"})
    found = huggingface.measure_module(of, "decode_graph", 4, (32, 48, 4, 2), rounds=1)
    assert found[OURS].mode == "graph" and found[OURS].timing.median > 0
    assert found["eager"].reason.startswith("NotImplementedError: its loop over experts")


def test_every_published_shape_has_every_kind():
    kinds = {}
    for kind, model, *_ in huggingface.cases("published"):
        kinds.setdefault(model, []).append(kind)
    assert set(kinds) == {"mixtral", "qwen3_moe", "olmoe"}
    assert len({tuple(of) for of in kinds.values()}) == 1


def test_a_contender_that_forgets_the_weights_is_refused():
    def unweighted(layer, train):
        right = huggingface.line_up()[OURS].layer(layer, train)
        return Call(lambda: right.run() * 2, right.leaves)

    of = Field({OURS: Peer(OURS, "moe-router", unweighted)})
    for kind in ("prefill", "train"):
        found = huggingface.measure_module(of, kind, 16, (32, 48, 4, 2), rounds=1)[OURS]
        assert found.timing is None and found.reason.startswith("WrongResult: error")


@pytest.mark.parametrize("model", ["mixtral", "qwen3_moe", "olmoe"])
def test_a_model_decodes_the_same_token_at_every_run(model):
    """The cache is put back, and our backend's logits are those of eager."""
    whole = small_model(model, (32, 48, 4, 2), decodes=True, tokens=3)
    huggingface.line_up()  # registers
    whole.switch("eager")
    first = whole.run()
    torch.testing.assert_close(whole.run(), first)
    whole.switch(OURS)
    assert check(whole.run(), first) < 1e-2
    assert check(first.roll(1, 0), first) > 1e-2
