"""Routers of pruning around a model learn while the model stays, and what is saved comes back."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
)

import moe_router
from moe_router import Context
from moe_router.integrations.wrap import load_wrapped, set_context
from moe_router.layers.trial import trial_loss
from tests.integrations.test_wrap import SIZES, made


def accuracy(model, inputs, labels):
    model.eval()
    with torch.no_grad():
        return (model(**inputs).logits.argmax(-1) == labels).float().mean().item()


def task(n, seed):
    """Of 12 tokens one is below 10, which is the label; the first is always 10."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(11, 50, (n, 12), generator=generator)
    labels = torch.randint(8, (n,), generator=generator)
    ids[torch.arange(n), torch.randint(1, 12, (n,), generator=generator)] = 2 + labels
    ids[:, 0] = 10
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, labels


def test_the_routers_alone_are_trained_and_saved(tmp_path):
    """Gradients reach the router and nothing else."""
    model = moe_router.wrap(
        made(BertForSequenceClassification, num_labels=8), kind="prune", keep=0.5
    )
    inputs, _ = task(32, 0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fit(model, [p for p in model.parameters() if p.requires_grad], 3, 0.1)
    moved = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert moved == {n for n in before if ".prunes." in n} and len(moved) == 2
    model.eval().save_pretrained(tmp_path / "saved")
    again = load_wrapped(AutoModelForSequenceClassification, tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)


@pytest.mark.slow
def test_a_router_learns_whom_a_frozen_model_needs():
    """A dense model learns the task; then only its router, which must keep one token in four. The
    first layer mixes nothing, so what leaves after it is never seen."""
    torch.manual_seed(0)
    config = BertConfig(
        **(SIZES | {"initializer_range": 0.02, "num_hidden_layers": 3}), num_labels=8
    )
    model = BertForSequenceClassification(config)
    for parameter in model.bert.encoder.layer[0].attention.output.dense.parameters():
        nn.init.zeros_(parameter).requires_grad_(False)
    fit(model, [p for p in model.parameters() if p.requires_grad], 400, 3e-3)
    test = task(500, 10**6)
    assert accuracy(model, *test) > 0.98
    for way in ("gradient", "trials"):
        torch.manual_seed(0)
        router = deepcopy(model)
        moe_router.wrap(router, kind="prune", keep=0.25, first=0, every=5, curriculum=250)
        chance = accuracy(router, *test)
        learners = [p for p in router.parameters() if p.requires_grad]
        fit(router, learners, 300, 3e-2, trials=way == "trials")
        learned = accuracy(router, *test)
        assert chance < 0.7 and learned > 0.95, (way, chance, learned)


def fit(model, parameters, steps, lr, trials=False):
    model.train(not trials)
    optimizer = torch.optim.AdamW(list(parameters), lr=lr)
    for step in range(steps):
        set_context(model, Context(step=step))
        inputs, labels = task(64, step)

        def losses(inputs=inputs, labels=labels):
            logits = model(**inputs).logits
            return nn.functional.cross_entropy(logits, labels, reduction="none")

        loss = trial_loss(model, losses) if trials else losses().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
