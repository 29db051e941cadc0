"""The training benchmark in a tiny form, with real ranks over gloo."""

import json

import pytest
import torch
from torch.multiprocessing import ProcessExitedException

from benchmarks import results, train
from moe_router.config_file import config_to_dict, load_config
from tests.gloo import run_ranks

SMALL = (
    "data.seq_len=16", "model.layers=1", "model.dim=16", "model.heads=2", "model.moe.hidden=16",
    "train.batch=4",
)  # fmt: skip


def measured(rank, ranks, config, steps):
    return train.measure(torch.device("cpu"), config, steps)


def beside(rank, ranks, config, steps, weights):
    return train.measure_beside(torch.device("cpu"), config, steps, weights)


def run_here(ranks, kind, function, config, steps, *weights):
    assert kind == "cpu" and config["train"]["batch"] == 2 * ranks
    if weights == ("bf16",):
        raise ProcessExitedException("Traceback\nno memory", 0, 1, 1)
    if weights:
        assert function is train.measure_beside and ranks == 1
        return run_ranks(ranks, beside, config, steps, *weights)[0]
    if config["cluster"]["transport"] == "padded":
        raise ProcessExitedException("Traceback\nno room", 0, 1, 1)
    return run_ranks(ranks, measured, config, steps)[0]


def test_two_ranks_are_compared_with_one(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(train, "local_device", lambda ranks: "cpu")
    monkeypatch.setattr(train, "run_here", run_here)
    small = [part for change in SMALL for part in ("--set", change)]
    how = ["--transports", "padded,all_to_all", "--steps", "2", "--save", *small]
    train.main(["--config", "configs/quickstart.yaml", *how])
    saved = json.loads((tmp_path / "results/train.json").read_text())
    rows = {row["name"]: row for row in saved}
    one, two, over = (
        rows[f"train/{name}"] for name in ("tokens_per_s/1", "tokens_per_s/2", "2_over_1")
    )
    assert over["value"] == pytest.approx(two["value"] / one["value"], abs=1e-3)
    fp32, bf16 = (train.name_of(weights) for weights in ("fp32", "bf16"))
    assert over["transport"] == "all_to_all"
    assert over["reasons"] == {"padded": "no room", bf16: "no memory"}
    assert one["peers"][bf16] == {"reason": "no memory"} and one["best_peer"] == fp32
    assert one["ratio"] == pytest.approx(one["value"] / one["peer_value"], abs=1e-3)
    # other draws of weights on the same rows: near the logarithm of the vocabulary, both of them
    assert one["peers"][fp32]["loss"] == pytest.approx(one["loss"], abs=0.3)
    # the same text on every rank would be an error: two ranks train on other rows as well
    assert one["loss"] != two["loss"] and one["mfu"] is None
    assert two["value"] == pytest.approx(4 * 16 / two["step_ms"] * 1e3, rel=1e-2)


def test_mfu_is_that_of_all_ranks():
    config = train.at(train.load_config("configs/gpu.yaml"), 2, "peer_memory")
    said = {"seconds": [0.1, 0.3, 0.2], "tokens": 32768, "loss": 1.0, "repeated": 0}
    found = train.speed(config, said | {"peak_bytes": 1}, "NVIDIA H200")
    flops = 2.37041664e9 * 32768 / 0.2 / 2  # docs: moe-router cost configs/gpu.yaml
    assert found["mfu"] == pytest.approx(flops / 989e12, abs=1e-4)
    assert (found["tokens_per_s"], found["step_ms"], found["p90_ms"]) == (163840.0, 200.0, 300.0)


def test_one_rank_is_compared_with_transformers_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(train, "run_here", run_here)
    small = [part for change in SMALL for part in ("--set", change)]
    how = ["--ranks", "1", "--steps", "1", "--set", "cluster.device=cpu", "--save", *small]
    monkeypatch.setattr(train, "local_device", lambda ranks: "cpu")
    train.main(["--config", "configs/quickstart.yaml", *how])
    (row,) = json.loads((tmp_path / "results/train.json").read_text())
    assert row["name"] == "train/tokens_per_s/1" and row["ratio"] > 0


def test_the_peer_learns_the_same_rows_and_has_the_same_sizes():
    small = load_config("configs/quickstart.yaml", [*SMALL, "train.lr=0.01", "train.warmup=1"])
    config = train.at(small, 1, "all_to_all")
    losses = [
        run_ranks(1, beside, config_to_dict(config), steps, "fp32")[0]["loss"] for steps in (1, 12)
    ]
    assert losses[1] < losses[0] - 0.5
    more = config_to_dict(config)
    more["model"]["moe"]["shared_hidden"] = 8
    with pytest.raises(AssertionError, match="shared_hidden"):
        run_ranks(1, beside, more, 1, "fp32")
