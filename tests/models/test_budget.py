"""The expected cost: what the routers' probabilities say, in the FLOPs of the blocks; its price."""

import pytest
import torch

from moe_router import Context, Ledger
from moe_router.config import RoutingConfig
from moe_router.errors import ConfigError
from moe_router.models.account import flops_of_blocks
from moe_router.models.budget import Budget, ExpectedCost
from moe_router.routing.depth import Kept
from moe_router.types import Choice
from tests.models.helpers import packed, small_model

LENGTHS = [5, 1, 9, 3]
THRESHOLD = {"kind": "prune", "decide": "threshold", "every": 1, "first": 0}
HALT = {"kind": "halt", "start": -0.5, "every": 1, "first": 0}


def test_flops_of_blocks_are_those_that_the_ledger_has():
    for moe in (None, {"every": 2, "first": 1, "shared_hidden": 4}):
        for classes in (0, 3):
            routing = RoutingConfig(kind="halt", cost_loss=1.0)
            model = small_model(moe, routing=routing, layers=4, classes=classes)
            ledger = Ledger()
            model(*packed(LENGTHS), context=Context(ledger=ledger))
            dense = sum(d for op, (_, d) in ledger.by_op().items() if op != "router")
            flops = flops_of_blocks(model.config, LENGTHS, causal=not classes)
            assert sum(map(sum, flops)) * sum(LENGTHS) == pytest.approx(dense, rel=1e-9)


def kept(expected):
    nobody = torch.zeros(0, 1, dtype=torch.int32)
    return Kept(nobody, None, (), torch.tensor(expected))


def test_the_cost_is_the_sum_over_tokens_and_blocks():
    cost = ExpectedCost([(1.0, 0.0), (2.0, 0.0), (1.0, 4.0)], 10)
    cost.block(0, None)  # every token
    cost.leave(kept(6.0))
    cost.block(1, None)
    cost.leave(None)
    cost.block(2, kept(3.0))  # of this block alone
    assert float(cost.loss(torch.tensor(10.0))) == pytest.approx((10 + 2 * 6 + 5 * 3) / (8 * 10))


def test_null_experts_cost_nothing():
    cost = ExpectedCost([(1.0, 0.0), (1.0, 6.0)], 10)
    cost.block(0, None)
    empty = torch.zeros(0, 1)
    cost.block(1, kept(4.0), Choice(empty.int(), empty, real=torch.tensor(0.5)))
    assert float(cost.loss(torch.tensor(10.0))) == pytest.approx((10 + 4 * (1 + 3)) / (8 * 10))


def test_the_cost_teaches_the_experts_router_to_choose_null_ones():
    routing = RoutingConfig(kind="leap", start=0.3, every=1, first=0, cost_loss=1.0)
    moe = {"null_experts": 2, "balance_loss": 0.0}
    model = small_model(moe, routing=routing, layers=2, std=1.0).double()
    output = model(*packed(LENGTHS))
    shares = [routed.choice.real for routed in output.routed]
    assert all(0.5 < float(share.detach()) < 1 for share in shares)
    output.depth[-1]["cost"].backward()
    with torch.no_grad():
        for moe in model.moes:
            moe.router.score.weight -= moe.router.score.weight.grad
        after = [routed.choice.real for routed in model(*packed(LENGTHS)).routed]
    assert all(bool(b < a) for a, b in zip(shares, after, strict=True))


@pytest.mark.parametrize("kind", ["halt", "threshold"])
def test_the_cost_moves_the_routers_towards_fewer_tokens(kind):
    routing = RoutingConfig(**(HALT if kind == "halt" else THRESHOLD), cost_loss=1.0)
    model = small_model(None, routing=routing, layers=3, classes=0 if kind == "halt" else 3)
    layers = model.halts if kind == "halt" else model.prunes
    output = model.double()(*packed(LENGTHS))
    cost = next(losses["cost"] for losses in output.depth if "cost" in losses)
    assert 0 < float(cost.detach()) < 1
    cost.backward()
    for layer in layers.values():
        grad = float(layer.router.bias.grad)
        # one logit says halt, the other says stay
        assert grad < 0 if kind == "halt" else grad > 0


def test_the_coefficient_rises_while_too_much_is_executed_and_falls_while_too_little_is():
    config = RoutingConfig(
        **THRESHOLD, budget=0.5, cost_loss=0.1, budget_rate=0.1, soft_steps=2, curriculum=10
    )
    budget = Budget(config)
    assert budget.state_dict().keys() == {"sum", "now"}
    budget.update(executed=1.0, expected=0.9, step=0)  # soft: 0 saved; and the budget is still 1
    assert float(budget.sum) == pytest.approx(0.09)
    budget.update(executed=0.8, expected=0.0, step=5)
    assert float(budget.sum) == pytest.approx(0.09 + 0.1 * (0.8 - 0.75))
    assert float(budget.weight) == pytest.approx(0.095 + 20 * 0.1 * (0.8 - 0.75))
    budget.update(executed=0.1, expected=0.0, step=10)
    assert float(budget.weight) < 0


def test_what_is_eased_comes_down_from_1():
    config = RoutingConfig(kind="skip", keep=0.5, curriculum=4)
    assert [config.eased(0.5, step) for step in range(6)] == [1, 0.875, 0.75, 0.625, 0.5, 0.5]
    assert config.eased(0.5, None) == 0.5
    model, shares = small_model(None, routing=config, layers=2), []
    for step in (0, 2, 4, None):
        ledger = Ledger()
        model(*packed([16]), context=Context(ledger=ledger, step=step))
        shares.append(ledger.by_op()["mlp"][0] / ledger.by_op()["mlp"][1])
    assert shares == [1, (16 + 12) / 32, 0.75, 0.75]


@pytest.mark.parametrize(
    ("routing", "message"),
    [
        ({"kind": "skip", "keep": 0.0}, "routing.keep=0.0: want 0 < keep <= 1"),
        ({"kind": "skip", "keep": 1.5}, "routing.keep=1.5: want 0 < keep <= 1"),
        ({"kind": "skip", "budget": 0.5}, "routing.budget=0.5: want null: keep says how many"),
        ({"kind": "prune", "cost_loss": 0.5}, "routing.cost_loss=0.5: want 0: keep says how many"),
        (HALT | {"budget": 0.0}, r"routing.budget=0.0: want 0 < budget <= 1, or null"),
        (HALT | {"budget_rate": 0.0}, "routing.budget_rate=0.0: want above 0"),
        (
            HALT | {"halting": "act", "soft_steps": 1},
            "routing.soft_steps=1: want 0: a sum over 1 ends what act weighs",
        ),
        ({"kind": "skip", "soft_steps": 1}, "routing.soft_steps=1: want 0, or model.routing.kind="),
        (HALT | {"curriculum": -1}, "routing.curriculum=-1: want 0 or more steps"),
        (HALT | {"cost_loss": -1.0}, "routing.cost_loss=-1.0: want 0 or more"),
    ],
)
def test_a_bad_config_is_one_line(routing, message):
    with pytest.raises(ConfigError, match=message):
        RoutingConfig(**routing)


def test_a_block_beyond_the_model_is_refused():
    with pytest.raises(ConfigError, match=r"model\.routing\.first=4: want "):
        small_model(None, routing=RoutingConfig(kind="skip", first=4), layers=4)
