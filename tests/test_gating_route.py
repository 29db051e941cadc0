"""`GatingService.route`: the same decisions as the Router and the plan, taken directly."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_router.config import RouterConfig
from moe_router.errors import GatingError, StaleEpochError, UnknownRouterError
from moe_router.gating import GatingService
from moe_router.placement import Placement
from moe_router.routing import make_plan
from moe_router.routing.decide import capacity
from moe_router.types import Tokens
from tests.gating import CONFIG, D, publish, router, weights


@pytest.fixture
def service():
    made = GatingService()
    publish(made)
    return made


@st.composite
def cases(draw):
    """(config, D, lengths of the sequences, seed)."""
    experts = draw(st.integers(1, 6))
    policy = draw(st.sampled_from(["top_k", "top_k", "expert_choice"]))
    plain = policy == "expert_choice"
    config = RouterConfig(
        experts=experts,
        top_k=draw(st.integers(1, experts)),
        policy=policy,
        score=draw(st.sampled_from(["softmax", "sigmoid"])),
        router=draw(st.sampled_from(["linear", "mlp", "position"])),
        router_hidden=4,
        renormalise=draw(st.booleans()),
        null_experts=0 if plain else draw(st.integers(0, 2)),
        bias_rate=0.0 if plain else draw(st.sampled_from([0.0, 0.1])),
        jitter=draw(st.sampled_from([0.0, 0.2])),
        capacity_factor=draw(st.sampled_from([None, 0.5, 1.0, 1.25])),
        drop=draw(st.sampled_from(["position", "score"])),
        z_loss=0.1,
        sequence_balance_loss=0.1,
    )
    lengths = draw(st.lists(st.integers(0, 9), min_size=1, max_size=4))
    return config, draw(st.integers(1, 9)), lengths, draw(st.integers(0, 2**31))


@settings(max_examples=60, deadline=None)
@given(cases())
def test_route_is_the_router_and_the_plan(case):
    config, dim, lengths, seed = case
    own = router(config, dim=dim, layer=3, seed=seed)
    service = GatingService()
    service.publish(
        epoch=1,
        step=0,
        placements=[Placement.contiguous(config.experts, 1)],
        capacity_factor=config.capacity_factor,
        routers=[weights(own, dim=dim)],
    )
    T = sum(lengths)
    x_TD = torch.randn(T, dim)
    offsets_B1 = torch.tensor([sum(lengths[:b]) for b in range(len(lengths) + 1)]).int()
    position_T = torch.tensor([t for n in lengths for t in range(n)], dtype=torch.int32)

    got = service.route("run", 3, 1, x_TD, offsets_B1)
    with torch.no_grad():
        want = own(Tokens(x_TD, position_T, offsets_B1))
    assert torch.equal(got.choice.target_TK, want.target_TK)
    assert torch.equal(got.choice.weight_TK, want.weight_TK)
    assert got.choice.losses.keys() == {"balance", "z", "sequence_balance"}
    for name, loss in want.losses.items():
        assert torch.equal(got.choice.losses[name], loss), name
    limited = config.policy == "expert_choice" or config.capacity_factor is not None
    limit = capacity(T, config) if limited else None
    assert got.capacity == limit
    plan = make_plan(want, config.experts, capacity=limit, drop=config.drop, position_T=position_T)
    for name in ("src_R", "choice_R", "offsets_G1", "row_TK"):
        assert torch.equal(getattr(got.plan, name), getattr(plan, name)), name
    assert got.position_TK.dtype == torch.int32
    assert got.position_TK.tolist() == places(want, position_T, limit, config.drop)


def places(choice, position_T, limit, drop):
    """The definition, choice by choice: an expert serves its first `limit` choices, then its
    rows lie in the order of tokens."""
    target, weight = choice.target_TK.tolist(), choice.weight_TK.tolist()
    spots = [(t, k) for t in range(len(target)) for k in range(len(target[t]))]
    out = [[-1] * len(row) for row in target]
    for expert in {e for row in target for e in row if e >= 0}:
        mine = [(t, k) for t, k in spots if target[t][k] == expert]
        if drop == "position":
            first = sorted(mine, key=lambda s: (int(position_T[s[0]]), s))
        else:
            first = sorted(mine, key=lambda s: (-weight[s[0]][s[1]], s))
        for place, (t, k) in enumerate(sorted(first[:limit])):
            out[t][k] = place
    return out


def test_without_bounds_it_is_one_sequence(service):
    x_TD = torch.randn(5, D)
    publish(service, router(dataclasses.replace(CONFIG, router="position")), epoch=2)
    alone = service.route("run", 0, 2, x_TD)
    same = service.route("run", 0, 2, x_TD, torch.tensor([0, 5]))
    apart = service.route("run", 0, 2, x_TD, torch.tensor([0, 1, 2, 3, 4, 5]))
    assert torch.equal(alone.choice.weight_TK, same.choice.weight_TK)
    assert not torch.equal(alone.choice.weight_TK, apart.choice.weight_TK)


def test_bf16_states_are_routed_as_fp32_ones(service):
    x_TD = torch.randn(7, D).bfloat16()
    narrow, wide = (service.route("run", 0, 1, x) for x in (x_TD, x_TD.float()))
    assert torch.equal(narrow.choice.weight_TK, wide.choice.weight_TK)


def test_the_capacity_is_the_services(service):
    loose = router(dataclasses.replace(CONFIG, capacity_factor=4.0))
    publish(service, loose, epoch=2, factor=0.5)
    got = service.route("run", 0, 2, torch.randn(16, D))
    assert got.capacity == 4 and got.plan.rows_G.max() <= 4
    (held,) = service.snapshot().routers
    assert held.config.capacity_factor == 0.5


def test_an_unknown_router_is_named_with_those_there_are(service):
    for key in (("run", 1), ("walk", 0)):
        with pytest.raises(UnknownRouterError, match=rf"{key[0]}/{key[1]}: .*there are: run/0"):
            service.route(*key, 1, torch.zeros(1, D))
    with pytest.raises(UnknownRouterError, match="there are: none"):
        GatingService().route("run", 0, 0, torch.zeros(1, D))


@pytest.mark.parametrize("epoch", [0, 2])
def test_another_epoch_is_stale(service, epoch):
    with pytest.raises(StaleEpochError, match=f"run/0: epoch {epoch}, want 1; take the present"):
        service.route("run", 0, epoch, torch.zeros(1, D))


@pytest.mark.parametrize(
    ("x_TD", "said"),
    [
        (torch.zeros(3, D + 1), r"got \(3, 9\), want \(T, 8\)"),
        (torch.zeros(D), r"got \(8,\), want \(T, 8\)"),
        (torch.zeros(3, D, dtype=torch.int32), "got torch.int32, want float32"),
        (torch.full((3, D), torch.nan), "got NaN or infinite, want finite"),
        (torch.full((3, D), -torch.inf), "got NaN or infinite, want finite"),
    ],
)
def test_states_that_cannot_be_routed_are_refused(service, x_TD, said):
    with pytest.raises(GatingError, match=f"x_TD for run/0: {said}"):
        service.route("run", 0, 1, x_TD)


@pytest.mark.parametrize("bounds", [[], [0], [3], [0, 2], [1, 3], [0, 4], [0, 2, 1, 3], [[0, 3]]])
def test_bounds_that_are_none_are_refused(service, bounds):
    with pytest.raises(GatingError, match=r"offsets_B1 for run/0: .* want 0, ascending, and 3"):
        service.route("run", 0, 1, torch.zeros(3, D), torch.tensor(bounds))
