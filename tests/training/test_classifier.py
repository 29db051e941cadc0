"""Training a classifier: it learns, ranks agree, a resume is exact."""

import pytest
import torch

from moe_router.config_file import config_from_dict
from moe_router.errors import ConfigError, NotCausalError
from moe_router.training.evaluate import matthews
from moe_router.training.inference import load_for_inference, load_model
from moe_router.training.loop import Trainer
from tests.gloo import run_ranks
from tests.training import classify

STEPS = 4


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in other)


def test_it_learns_to_separate_and_says_how_well(tmp_path):
    config = classify.config(tmp_path, train={"steps": 60, "lr": 1e-2, "batch": 16})
    trainer = Trainer(config)
    before = trainer.evaluate()
    records = [trainer.train_step() for _ in range(60)]
    after = trainer.evaluate()
    assert after.accuracy > 0.95 > before.accuracy and after.matthews > 0.9
    assert after.bits_per_byte is None and "of the labels right" in str(after)
    # half of the tokens leave after the first of two blocks
    share = records[-1].executed_flops / records[-1].dense_flops
    assert 0.7 < share < 0.8 and records[-1].loss < 0.2


@pytest.mark.parametrize("moe", [False, True])
def test_two_ranks_follow_the_curve_of_one(tmp_path, moe):
    keys = classify.MOE if moe else {}
    config = classify.config(tmp_path, model=keys)
    (one,) = run_ranks(1, classify.curve, config, STEPS)
    two = run_ranks(2, classify.curve, config, STEPS)
    for record, other in zip(one[0], two[0][0], strict=True):
        assert other.loss == pytest.approx(record.loss, rel=1e-5)
        assert other.grad_norm == pytest.approx(record.grad_norm, rel=1e-4)
        assert (other.tokens, other.executed_flops) == (record.tokens, record.executed_flops)
    assert two[0][1].accuracy == one[1].accuracy
    assert two[0][1].loss == pytest.approx(one[1].loss, rel=1e-5)
    assert two[0][1] == two[1][1]


def test_a_resume_is_exact_and_generate_refuses(tmp_path):
    config = classify.config(tmp_path)
    straight, resumed = Trainer(config), Trainer(config)
    for step in range(STEPS):
        if step == 2:
            straight.save(tmp_path, wait=True)
        straight.train_step()
    resumed.restore(tmp_path / "step_2")
    for _ in range(2, STEPS):
        resumed.train_step()
    assert equal(resumed.model.state_dict(), straight.model.state_dict())
    model, loaded, _ = load_model(tmp_path / "step_2")
    assert loaded == config and model.classes == 2
    with pytest.raises(NotCausalError, match=r"model\.kind=encoder labels texts and makes none"):
        load_for_inference(tmp_path / "step_2")


def test_matthews_is_the_correlation_of_the_binary_case():
    counts = torch.tensor([[30.0, 10.0], [5.0, 55.0]], dtype=torch.float64)
    true = torch.tensor([0.0] * 40 + [1.0] * 60)
    guess = torch.tensor([0.0] * 30 + [1.0] * 10 + [0.0] * 5 + [1.0] * 55)
    assert matthews(counts) == pytest.approx(torch.corrcoef(torch.stack([true, guess]))[0, 1])
    assert matthews(torch.tensor([[40.0, 0.0], [60.0, 0.0]]).double()) == 0.0


@pytest.mark.parametrize(
    ("data", "model", "message"),
    [
        ({"labels": ["a"]}, {}, r"data\.labels=\['a'\]: want at least 2 names"),
        ({"labels": ["a", "a"]}, {}, r"data\.labels.*each once"),
        ({"labels": "a"}, {}, r"data\.labels='a': want a list, each text"),
        ({}, {"kind": "causal_lm", "routing": None}, r"model\.kind=causal_lm: want encoder"),
        ({"source": "pydoc"}, {}, r"model\.kind=encoder: want causal_lm, for data\.source=pydoc"),
    ],
)
def test_configs_that_do_not_fit_end_in_one_line(tmp_path, data, model, message):
    with pytest.raises(ConfigError, match=message):
        config_from_dict(classify.plain(tmp_path, data=data, model=model))
