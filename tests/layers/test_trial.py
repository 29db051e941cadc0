"""Routers of pruning learn by trials what each token is worth, and nobody else learns."""

import pytest
import torch
from torch import nn

from moe_router.config_routing import RoutingConfig
from moe_router.errors import ConfigError
from moe_router.layers.prune import Prune
from moe_router.layers.trial import trial_loss
from moe_router.routing.context import PLAIN
from moe_router.types import Tokens

D, LENGTHS = 8, (12, 7, 1, 9)


class Valued(nn.Module):
    """Two layers that prune. A token is worth what `value_D` says, and nobody knows that."""

    def __init__(self, **routing):
        super().__init__()
        config = RoutingConfig(kind="prune", **{"keep": 0.6} | routing)
        self.prunes = nn.ModuleList(Prune(D, config) for _ in range(2))
        self.value_D = nn.Parameter(torch.linspace(-1, 1, D))
        self.kept = []

    def forward(self, x_TD):
        """(B,) the worth of all that is lost."""
        lengths, lost_B = list(LENGTHS), 0
        position_T = torch.cat([torch.arange(n) for n in lengths])
        for prune in self.prunes:
            bounds_B1 = nn.functional.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()
            _, kept = prune(Tokens(x_TD, position_T, bounds_B1), lengths, PLAIN)
            worth = torch.where(kept.target_T1[:, 0] < 0, x_TD @ self.value_D, 0.0)
            lost_B = lost_B + torch.stack([part.sum() for part in worth.split(lengths)])
            src_R, lengths = kept.plan.src_R.long(), list(kept.lengths)
            x_TD, position_T = x_TD[src_R], position_T[src_R]
            self.kept.append(kept.lengths)
        return 100 * lost_B


def states():
    """Of one norm, which routers do not see."""
    return nn.functional.rms_norm(torch.randn(sum(LENGTHS), D), (D,))


def test_logits_become_what_tokens_are_worth():
    """From losses of whole sequences alone, in any unit."""
    torch.manual_seed(0)
    model = Valued().eval()
    routers = [p for n, p in model.named_parameters() if n.startswith("prunes")]
    optimizer = torch.optim.Adam(routers, 0.05)
    missed = []
    for _ in range(150):
        x_TD = states()
        loss = trial_loss(model, lambda x_TD=x_TD: model(x_TD))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        missed.append(loss.item())
    assert model.value_D.grad is None
    assert sum(missed[-50:]) / 50 < 0.8 * sum(missed[:20]) / 20  # each draw has its own noise
    x_TD = states()
    for prune in model.prunes:
        logit_T = prune.router(x_TD, torch.zeros(len(x_TD)))
        corr = torch.corrcoef(torch.stack([logit_T, x_TD @ model.value_D]))[0, 1]
        assert corr > 0.95


def test_as_many_leave_as_ever_and_the_first_stays():
    torch.manual_seed(0)
    model, x_TD = Valued().eval(), states()
    with torch.no_grad():
        first, again = model(x_TD), model(x_TD)
    assert torch.equal(first, again)
    trial_loss(model, lambda: model(x_TD))
    assert model.kept == [(8, 5, 1, 6), (5, 3, 1, 4)] * 4
    with torch.no_grad():  # and afterwards the routers decide again
        assert torch.equal(model(x_TD), first)


def test_equal_losses_teach_nothing():
    model = Valued(keep=1.0).eval()
    assert trial_loss(model, lambda: model(states())).item() == 0


def test_what_is_wrong_says_why():
    x_TD = states()
    with pytest.raises(ConfigError, match="the model prunes nothing; want kind=prune"):
        trial_loss(nn.Linear(2, 2), lambda: None)
    for wrong in ({"decide": "threshold"}, {"router": "attention"}):
        model = Valued(**wrong)
        with pytest.raises(ConfigError, match="want decide=top and a router with logits"):
            trial_loss(model, lambda: None)
    model = Valued()
    with pytest.raises(ConfigError, match=r"losses of shape \(\): want \(4,\), one for each"):
        trial_loss(model, lambda: model(x_TD).mean())
    assert not any(prune.tries for prune in model.prunes)
    with pytest.raises(ZeroDivisionError):
        trial_loss(model, lambda: 1 / 0)
    assert not any(prune.tries for prune in model.prunes)
