"""The knob of a checkpoint: from the least to the most that its routers can compute."""

import pytest
import torch

from moe_router.errors import ConfigError
from moe_router.training.calibrate import calibrate
from moe_router.training.loop import Trainer
from tests.training import work
from tests.training.test_classifier import config_of, texts

__all__ = ["texts"]  # a fixture

CAUSAL = {
    "skip": {"kind": "skip", "every": 1, "first": 1},
    "halt": {"kind": "halt", "every": 1, "first": 0},
    "tsa": {"kind": "halt", "halting": "tsa", "threshold": 0.5, "every": 1, "first": 0},
    "leap": {"kind": "leap", "every": 1, "first": 1},
}


def trained(config):
    trainer = Trainer(config)
    for _ in range(5):
        trainer.train_step()
    return trainer.model.eval(), trainer.dataset, config


def between(model, dataset, config):
    shares = [calibrate(model, dataset, config, budget) for budget in (0.0, 0.25, 0.5, 0.75, 1.0)]
    floor, ceiling = shares[0], shares[-1]
    assert floor < ceiling - 0.2 and shares == sorted(shares)
    return [(share - floor) / (ceiling - floor) for share in shares]


@pytest.mark.parametrize("kind", CAUSAL)
def test_what_is_executed_follows_the_knob_and_stays_causal(kind):
    model, dataset, config = trained(
        work.tiny(model={"moe": None, "layers": 4, "routing": CAUSAL[kind]}, lr=5e-3)
    )
    assert between(model, dataset, config) == pytest.approx([0, 0.25, 0.5, 0.75, 1], abs=0.06)
    calibrate(model, dataset, config, 0.5)
    ids_T, position_T = torch.arange(12), torch.arange(12, dtype=torch.int32)
    bounds, other_T = torch.tensor([0, 12]), torch.cat([torch.arange(7), torch.arange(5) + 40])
    prefix, other = (model(x, position_T, bounds).logits_TV[:7] for x in (ids_T, other_T))
    torch.testing.assert_close(prefix, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["prune", "threshold_budget"])
def test_pruning_follows_the_knob(texts, name):
    model, dataset, config = trained(config_of(texts, name))
    assert between(model, dataset, config) == pytest.approx([0, 0.25, 0.5, 0.75, 1], abs=0.12)


def test_an_evaluation_says_what_it_executed_hard_and_soft():
    routing = CAUSAL["tsa"] | {"threshold": 0.3, "start": -1.0}
    config = work.tiny(model={"moe": None, "layers": 4, "routing": routing})
    trainer = Trainer(config)
    hard = trainer.evaluate()
    trainer.model.soften_routers(True)
    soft = trainer.evaluate()
    assert 0.4 < hard.executed < 0.8 and hard.loss != soft.loss
    # everything, and the gates, which the dense model does not have
    assert 1 < soft.executed < 1.05
    assert Trainer(work.tiny(model={"moe": None})).evaluate().executed is None


def test_a_model_without_such_routers_and_a_budget_out_of_range_are_refused():
    model, dataset, config = trained(work.tiny(model={"moe": None}))
    with pytest.raises(ConfigError, match=r"budget 0\.5: want a model whose tokens skip, halt"):
        calibrate(model, dataset, config, 0.5)
    with pytest.raises(ConfigError, match=r"budget 1\.5: want 0, the least, to 1, the most"):
        calibrate(model, dataset, config, 1.5)
