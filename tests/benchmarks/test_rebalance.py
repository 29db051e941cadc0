"""The benchmark's skew is what its rows say, and its rows say what was measured."""

import pytest
import torch

from benchmarks import rebalance as bench
from moe_router.training.loop import Trainer
from tests.gloo import run_ranks


def leaned(rank, ranks, top_k):
    trainer = Trainer(bench.config_of(top_k, "cpu", moving=True), rank=rank, ranks=ranks)
    bench.lean(trainer, 0.4)
    layers = bench.moe_layers(trainer.model)
    return bench._shares(trainer, layers)


@pytest.mark.slow
@pytest.mark.parametrize("top_k", [1, 2])
def test_one_expert_gets_its_share_and_the_others_as_much_each(top_k):
    for shares_LE in run_ranks(2, leaned, top_k):
        assert shares_LE[:, bench.HOT].tolist() == pytest.approx([0.4], abs=0.05)
        others = torch.cat([shares_LE[:, : bench.HOT], shares_LE[:, bench.HOT + 1 :]], 1)
        assert (others - (top_k - 0.4) / 7).abs().max() < 0.1
        assert float(shares_LE.sum()) == pytest.approx(top_k)


def test_a_row_compares_medians():
    looks = [
        {"slots": 3, "straggler_us": 20, "before_us": None},
        {"slots": 0, "straggler_us": 15, "before_us": 20},
    ]
    said = {"before": [0.3, 0.2, 0.9], "after": [0.1, 0.8, 0.2], "looks": looks, "losses": 1e-7}
    said |= {"before_cpu": [0.3], "after_cpu": [0.2], "share": 0.4, "max_over_mean": [1.3, 1.0]}
    row = bench.row_of("K1/hot40", said, "cpu")
    assert (row["value"], row["before"], row["ratio"]) == (200.0, 300.0, 1.5)
    assert (row["cpu_ratio"], row["moved"], row["straggler_us"]) == (1.5, 3, 15)
    assert row["correct"] and not bench.row_of("x", said | {"losses": 1e-4}, "cpu")["correct"]
