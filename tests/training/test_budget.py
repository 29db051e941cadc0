"""Training executes the share of FLOPs that it was told to, by the Ledger."""

import pytest

from moe_router.training.loop import Trainer
from tests.training import work
from tests.training.test_classifier import config_of, texts

__all__ = ["texts"]  # a fixture

LEAP = {"kind": "leap", "start": -1.0}
HALT = {"kind": "halt", "threshold": 0.9, "start": -1.0, "ponder_loss": 0.0}


def shares(trainer, steps):
    records = [trainer.train_step() for _ in range(steps)]
    return [record.executed_flops / record.dense_flops for record in records]


@pytest.mark.parametrize(("kind", "budget"), [(HALT, 0.5), (LEAP, 0.4)])
def test_whoever_halts_or_leaps_comes_to_the_budget(kind, budget):
    routing = kind | {"every": 1, "first": 0, "budget": budget}
    model = {"moe": None, "layers": 4, "routing": routing}
    ran = shares(Trainer(work.tiny(model=model, lr=5e-3, steps=120)), 120)
    assert ran[0] > 0.9
    assert sum(ran[-20:]) / 20 == pytest.approx(budget, abs=0.06)


def test_pruning_by_threshold_comes_to_its_budget(texts):
    ran = shares(Trainer(config_of(texts, "threshold_budget", lr=5e-3, steps=100)), 100)
    assert min(ran[:10]) > 1  # soft: nobody has left yet
    assert sum(ran[-20:]) / 20 == pytest.approx(0.5, abs=0.06)
