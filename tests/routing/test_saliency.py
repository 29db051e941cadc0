"""Routers that learn by saliency: all are computed, and whoever would leave counts for nothing."""

from dataclasses import replace

import pytest
import torch

from moe_router import Context, Ledger
from moe_router.config import RoutingConfig
from moe_router.errors import ConfigError
from moe_router.layers.leap import Leap
from moe_router.layers.prune import Prune
from moe_router.routing.saliency import LEAST, counted
from tests.models.helpers import packed, small_model

ALL = {"every": 1, "first": 0}
LENGTHS = [9, 1, 0, 14, 6]
PRUNE = RoutingConfig(kind="prune", keep=0.5, soft_steps=2, temperature=0.3, **ALL)
LEAP = RoutingConfig(kind="leap", start=0.0, soft_steps=2, **ALL)


def test_counts_one_or_nothing_and_learns_around_the_cut():
    """Two of a sequence of four, of which the first is not asked; all of one; none of one."""
    offsets_B1 = torch.tensor([0, 4, 6, 7], dtype=torch.int32)
    logit_T = torch.tensor([9.0, 1.0, 0.4, -3.0, 0.2, 0.1, 0.5], requires_grad=True)
    taken_T = torch.tensor([True, True, False, False, True, True, False])
    asked_T = torch.tensor([False, True, True, True, True, True, True])
    mass_T = counted(logit_T, taken_T, asked_T, offsets_B1, 0.5)
    assert mass_T.tolist() == pytest.approx([1, 1, LEAST, LEAST, 1, 1, LEAST], rel=1e-6, abs=0)
    (grad_T,) = torch.autograd.grad(mass_T.sum(), logit_T)
    margin_T = (torch.tensor([1.0, 0.4, -3.0]) - 0.7) / 0.5  # 0.7: between 1.0 and 0.4
    slope_T = margin_T.sigmoid() * (-margin_T).sigmoid() / 0.5
    torch.testing.assert_close(grad_T, torch.tensor([0.0, *slope_T.tolist(), 0.0, 0.0, 0.0]))


def classifier(routing):
    return small_model(routing=routing, layers=4, classes=3).double()


def test_a_soft_step_has_the_loss_of_the_pruned_model_and_saves_nothing():
    model, ledger = classifier(PRUNE), Ledger()
    soft_BC = model(*packed(LENGTHS), context=Context(ledger=ledger, step=1)).logits_BC
    executed, dense = ledger.totals()
    assert executed >= dense  # and the routers
    hard, ledger = Context(step=2), Ledger()
    torch.testing.assert_close(soft_BC, model(*packed(LENGTHS), context=hard).logits_BC)
    model.eval()
    last_BC = model(*packed(LENGTHS), context=Context(ledger=ledger)).logits_BC
    torch.testing.assert_close(soft_BC, last_BC)
    executed, dense = ledger.totals()
    assert executed < 0.6 * dense
    model.soften_routers(True)
    torch.testing.assert_close(soft_BC, model(*packed(LENGTHS)).logits_BC)


def saliency(routing, step, of):
    """What the loss says of the logits of the first router, and who is computed there."""
    model, seen, kept = classifier(routing), [], []
    router = next(m for m in model.modules() if isinstance(m, of)).router
    router.register_forward_hook(lambda *call: (call[-1].retain_grad(), seen.append(call[-1]))[1])
    context = Context(step=step, observe=lambda i, c, p: kept.append(c.target_TK[:, 0] >= 0))
    out = model(*packed(LENGTHS), context=context)
    out.logits_BC[:, 0].sum().backward()
    return seen[0].grad, kept


def test_a_token_that_would_leave_teaches_its_router():
    for routing, of in ((PRUNE, Prune), (LEAP, Leap)):
        grad_T, kept = saliency(routing, 1, of)
        assert all(ran.all() for ran in kept)  # everybody is computed
        position_T = packed(LENGTHS)[1]
        free_T = position_T >= routing.protect
        taught = (grad_T[free_T] != 0).double().mean()
        grad_T, kept = saliency(routing, 2, of)
        ran_T = next(ran for ran in kept if not ran.all())
        assert not ran_T.all()
        assert taught > (grad_T[free_T] != 0).double().mean()
        assert not grad_T[~ran_T].any()  # whoever left tells nothing


def test_mass_by_its_gradient_is_what_leaving_costs():
    """Of each token that stays, to the first order: beside a difference."""
    model, masses, step = classifier(replace(PRUNE, every=4)), [], 1e-2
    prune = model.prunes["0"]
    whole = prune.mass

    def loss(by_T):
        def mass(tokens, choice, kept):
            masses.append(whole(tokens, choice, kept) * (1 - by_T))
            return masses[-1]

        prune.mass = mass
        return model(*packed([9]), context=Context(step=0)).logits_BC[0, 0].double()

    (grad_T,) = torch.autograd.grad(loss(torch.zeros(9)), masses[-1:])
    stays_T = masses[0].detach() > 0.5
    assert 1 < stays_T.sum() < 9
    for t in stays_T.nonzero()[:, 0].tolist():
        by_T = step * (torch.arange(9) == t)
        change = (loss(by_T) - loss(-by_T)) / (2 * step)
        torch.testing.assert_close(-grad_T[t], change.detach(), rtol=1e-2, atol=1e-4)
    assert grad_T[stays_T].abs().max() > 0.01


@pytest.mark.parametrize("kind", ["skip", "merge"])
def test_who_has_no_such_steps_says_so(kind):
    with pytest.raises(ConfigError, match=r"soft_steps=3: want 0, or model\.routing\.kind=prune"):
        RoutingConfig(kind=kind, keep=0.5, soft_steps=3)
