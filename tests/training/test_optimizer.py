"""AdamW, its schedule and the clip, against their formulas."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from moe_router.config import TrainConfig
from moe_router.errors import ConfigError
from moe_router.training.optimizer import (
    clip,
    learning_rate,
    make_optimizer,
    set_rate,
    set_step,
    square_sum,
)

CONFIG = TrainConfig(steps=100, batch=1, lr=0.1, warmup=10, min_lr=0.2, weight_decay=0.5)


def module():
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(5, 1))
    made[2].requires_grad_(False)
    return made


def test_warms_up_then_falls_along_a_cosine_to_its_floor():
    rates = [learning_rate(step, CONFIG) for step in range(110)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) / 10 for i in range(10)])
    assert max(rates) == rates[9] == pytest.approx(0.1)
    assert rates[9:100] == sorted(rates[9:100], reverse=True)
    assert rates[54] == pytest.approx(0.06)  # half way: the mean of both ends
    assert rates[99:] == pytest.approx([0.02] * 11)


@pytest.mark.parametrize("warmup", [0, 1, 100, 200])
def test_any_warm_up_gives_a_rate(warmup):
    config = TrainConfig(steps=100, batch=1, lr=0.1, warmup=warmup)
    assert all(0 < learning_rate(step, config) <= 0.1 for step in range(100))


def test_routers_have_a_rate_of_their_own():
    model = nn.ModuleDict({"router": nn.Linear(3, 1), "mlp": nn.Linear(3, 1)})
    config = replace(CONFIG, router_lr=20.0, weight_decay=0.0)
    optimizer = make_optimizer(model, config)
    set_rate(optimizer, 0.01)
    before = {name: p.clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    moved = {n: float((before[n] - p).detach().mean()) for n, p in model.named_parameters()}
    assert moved["mlp.weight"] == pytest.approx(0.01, rel=1e-3)  # Adam's first step
    assert moved["router.weight"] == pytest.approx(0.2, rel=1e-3)
    assert moved["router.bias"] == pytest.approx(0.2, rel=1e-3)
    with pytest.raises(ConfigError, match=r"train.router_lr=0.0: want above 0, times train.lr"):
        replace(CONFIG, router_lr=0.0)


def test_matrices_decay_and_vectors_do_not():
    model = module()
    optimizer = make_optimizer(model, CONFIG)
    before = {name: p.clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    optimizer.step()
    shrunk = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert shrunk == {"0.weight"}
    torch.testing.assert_close(model[0].weight.data, before["0.weight"] * (1 - 0.1 * 0.5))


def test_steps_as_its_paper_says_also_after_a_restore():
    model = module()
    optimizer = make_optimizer(model, CONFIG)
    weight = model[1].weight
    grad = torch.linspace(-1, 1, 5)
    mean, square, step = torch.full((5,), 0.3), torch.full((5,), 0.2), 7
    optimizer.state[weight]["exp_avg"].copy_(mean)
    optimizer.state[weight]["exp_avg_sq"].copy_(square)
    set_step(optimizer, step)
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    weight.grad = grad.clone()
    before = weight.detach().clone()
    optimizer.step()
    mean = 0.9 * mean + 0.1 * grad
    square = 0.95 * square + 0.05 * grad**2
    bias1, bias2 = 1 - 0.9 ** (step + 1), 1 - 0.95 ** (step + 1)
    wanted = before - 0.1 * (mean / bias1) / ((square / bias2).sqrt() + 1e-8)
    torch.testing.assert_close(weight.data, wanted)


def test_what_does_not_learn_has_no_state():
    model = module()
    optimizer = make_optimizer(model, CONFIG)
    assert {id(p) for p in optimizer.state} == {
        id(p) for p in model.parameters() if p.requires_grad
    }


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 6), max_size=4),
    limit=st.floats(0, 10),
    seed=st.integers(0, 1000),
)
def test_clips_to_the_limit_and_keeps_the_direction(sizes, limit, seed):
    generator = torch.Generator().manual_seed(seed)
    grads = [torch.randn(n, 2, generator=generator) for n in sizes]
    before = torch.cat([g.flatten() for g in grads]) if grads else torch.zeros(0)
    norm = square_sum(grads, torch.device("cpu")).sqrt().item()
    assert norm == pytest.approx(before.double().norm().item(), rel=1e-6)
    clip(grads, norm, limit)
    after = torch.cat([g.flatten() for g in grads]) if grads else torch.zeros(0)
    scale = limit / norm if 0 < limit < norm else 1.0
    torch.testing.assert_close(after, before * scale)
    assert limit == 0 or after.norm() <= limit * (1 + 1e-5)
    assert math.isfinite(norm)
