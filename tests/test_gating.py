"""The gating service as a plain class: epochs, liveness, load, and the decisions of `route`."""

import dataclasses
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_router.config import MoEConfig, RouterConfig
from moe_router.errors import GatingError, StaleEpochError, UnknownRouterError
from moe_router.gating import GatingService
from moe_router.gating_records import RouterWeights
from moe_router.placement import Placement
from moe_router.routing import Router, make_plan
from moe_router.routing.decide import capacity
from moe_router.types import Tokens

E, D = 4, 8
CONFIG = RouterConfig(experts=E, top_k=2)


def router(config=CONFIG, *, dim=D, layer=0, seed=0) -> Router:
    torch.manual_seed(seed)
    made = Router(dim, config, layer=layer).eval()
    if config.bias_rate > 0:
        made.bias_E.normal_()
    return made


def weights(made: Router, model="run", dim=D) -> RouterWeights:
    return RouterWeights.of(model, dim, made, made.state_dict())


def publish(service, *routers, epoch=1, step=0, ranks=2, factor=None, placement=None):
    return service.publish(
        epoch=epoch,
        step=step,
        placement=placement or Placement.contiguous(E, ranks),
        capacity_factor=factor,
        routers=[weights(made) for made in routers or [router()]],
    )


@pytest.fixture
def clock():
    class Clock:
        now = 100.0

        def __call__(self):
            return self.now

    return Clock()


@pytest.fixture
def service(clock):
    made = GatingService(decay=0.5, heartbeat_timeout_s=10.0, clock=clock)
    publish(made)
    return made


# --- route -----------------------------------------------------------------------------------


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
        placement=Placement.contiguous(config.experts, 1),
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


# --- epochs ----------------------------------------------------------------------------------


def test_nothing_is_known_before_the_first_epoch():
    service = GatingService()
    assert service.snapshot().epoch == 0 and service.watch(0, 0.0) is None
    with pytest.raises(StaleEpochError, match="rank 0: nothing is published yet"):
        service.heartbeat(0)


def test_an_epoch_is_never_taken_back(service):
    publish(service, epoch=7, step=40)
    again = publish(service, router(seed=5), epoch=7, step=50)  # the very epoch: known already
    assert (again.epoch, again.step) == (7, 40)
    with pytest.raises(StaleEpochError, match="publish epoch 6: want one above 7"):
        publish(service, epoch=6)
    assert service.snapshot().epoch == 7


def test_a_service_that_starts_again_goes_on_above_the_last_epoch(service, clock):
    publish(service, epoch=7)
    again = GatingService(clock=clock)
    with pytest.raises(StaleEpochError):
        again.report_load(0, 7, torch.ones(1, E))
    assert publish(again, epoch=8).epoch == 8
    again.report_load(0, 8, torch.ones(1, E))
    assert again.snapshot().load_LE.tolist() == [[1.0] * E]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"epoch": 0}, r"epoch, step: got \(0, 3\)"),
        ({"step": -1}, r"epoch, step: got \(2, -1\)"),
        ({"capacity_factor": 0.0}, "capacity_factor: got 0.0, want above 0"),
        ({"capacity_factor": float("nan")}, "capacity_factor: got nan"),
        ({"placement": Placement.contiguous(3, 1)}, "experts of run/0: got 4, want 3"),
        ({"routers": [weights(router())] * 2}, "routers: got 2, want each model and layer once"),
    ],
)
def test_what_cannot_be_shared_is_refused_and_changes_nothing(service, change, said):
    good = {
        "epoch": 2,
        "step": 3,
        "placement": Placement.contiguous(E, 2),
        "capacity_factor": None,
        "routers": [weights(router())],
    }
    with pytest.raises(GatingError, match=said):
        service.publish(**{**good, **change})
    assert service.snapshot().epoch == 1
    assert service.publish(**good).epoch == 2


@pytest.mark.parametrize("given", [b"", b"no safetensors", weights(router(dim=5)).safetensors])
def test_weights_that_do_not_fit_are_refused_in_one_line(given):
    with pytest.raises(GatingError, match="router run/0: its weights do not fit: ") as said:
        dataclasses.replace(weights(router()), safetensors=given).build()
    assert "\n" not in str(said.value)


def test_weights_rebuild_the_router_and_draw_nothing():
    own = router(MoEConfig(experts=E, top_k=2, hidden=16, bias_rate=0.1), layer=5)
    torch.manual_seed(1)
    built = weights(own).build()
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(1))
    assert built.layer == 5 and type(built.config) is RouterConfig
    assert built.state_dict().keys() == own.state_dict().keys() == {"score.weight", "bias_E"}
    assert all(torch.equal(x, built.state_dict()[name]) for name, x in own.state_dict().items())


def test_a_snapshot_does_not_change_and_changes_nothing(service):
    service.report_load(0, 1, torch.ones(1, E))
    held = service.snapshot()
    with pytest.raises(dataclasses.FrozenInstanceError):
        held.epoch = 5
    held.load_LE.fill_(9)
    before = service.route("run", 0, 1, torch.ones(2, D)).choice.weight_TK
    own = held.routers[0].build()
    with torch.no_grad():
        own.score.weight.zero_()
    assert torch.equal(before, service.route("run", 0, 1, torch.ones(2, D)).choice.weight_TK)
    assert service.snapshot().load_LE.tolist() == [[1.0] * E]
    publish(service, router(seed=9), epoch=2, step=4)
    service.heartbeat(1)
    assert (held.epoch, held.step, held.alive) == (1, 0, (0,))


def test_the_caller_may_change_what_it_published(service):
    own = router(seed=3)
    publish(service, own, epoch=2)
    before = service.route("run", 0, 2, torch.ones(2, D)).choice.weight_TK
    with torch.no_grad():
        own.score.weight.zero_()
    assert torch.equal(before, service.route("run", 0, 2, torch.ones(2, D)).choice.weight_TK)


# --- watch -----------------------------------------------------------------------------------


def test_watch_gives_the_present_one_at_once_or_nothing_in_time(service):
    assert service.watch(0, 0.0).epoch == 1
    assert service.watch(1, 0.01) is None
    assert service.watch(9, 0.0).epoch == 1  # of a service that was lost
    with pytest.raises(GatingError, match="timeout_s: got -1, want 0 s or more"):
        service.watch(1, -1)


def test_watch_wakes_every_watcher(service):
    seen, started = [], threading.Barrier(4)

    def wait():
        started.wait()
        seen.append(service.watch(1, 30.0).epoch)

    threads = [threading.Thread(target=wait) for _ in range(3)]
    for thread in threads:
        thread.start()
    started.wait()
    publish(service, epoch=2)
    for thread in threads:
        thread.join(20.0)
    assert seen == [2, 2, 2]


# --- liveness and load -----------------------------------------------------------------------


def test_a_silent_rank_is_not_alive(service, clock):
    assert service.heartbeat(1) == service.heartbeat(0) == 1
    assert service.snapshot().alive == (0, 1)
    clock.now += 6
    service.heartbeat(0)
    clock.now += 4  # rank 1 has been silent for the timeout, not for longer
    assert service.snapshot().alive == (0, 1)
    clock.now += 0.1
    assert service.snapshot().alive == (0,)
    service.heartbeat(1)
    assert service.snapshot().alive == (0, 1)
    assert service.snapshot().epoch == 1  # who is alive was not agreed on


@pytest.mark.parametrize("rank", [-1, 2])
def test_a_rank_that_is_none_is_refused(service, rank):
    with pytest.raises(GatingError, match=rf"rank: got {rank}, want 0..1 \(placement\)"):
        service.heartbeat(rank)
    with pytest.raises(GatingError):
        service.report_load(rank, 1, torch.ones(1, E))
    assert service.snapshot().alive == ()


def test_load_is_a_moving_average_of_the_ranks_that_live(service, clock):
    service.report_load(0, 1, torch.tensor([[8.0, 0.0, 0.0, 0.0]]))
    clock.now += 8
    service.report_load(1, 1, torch.tensor([[0, 4, 0, 0]], dtype=torch.int32))
    service.report_load(1, 1, torch.tensor([[0, 8, 2, 0]], dtype=torch.int32))
    assert service.snapshot().load_LE.tolist() == [[8.0, 6.0, 1.0, 0.0]]
    clock.now += 8
    assert service.snapshot().load_LE.tolist() == [[0.0, 6.0, 1.0, 0.0]]
    service.report_load(0, 1, torch.tensor([[2.0, 0.0, 0.0, 0.0]]))  # begins anew
    assert service.snapshot().load_LE.tolist() == [[2.0, 6.0, 1.0, 0.0]]


@settings(max_examples=30, deadline=None)
@given(st.permutations([rank for rank in range(3) for _ in range(3)]), st.integers(0, 2**31))
def test_load_does_not_depend_on_who_reports_first(order, seed):
    reports = torch.rand(3, 3, 1, E, generator=torch.Generator().manual_seed(seed))

    def after(ranks):
        service = GatingService(decay=0.7)
        publish(service, ranks=3)
        sent = [0, 0, 0]
        for rank in ranks:
            service.report_load(rank, 1, reports[rank, sent[rank]])
            sent[rank] += 1
        return service.snapshot().load_LE

    assert torch.equal(after(order), after(sorted(order)))


def test_a_stale_report_is_a_heartbeat_and_no_load(service):
    publish(service, epoch=2)
    for epoch in (1, 3):
        with pytest.raises(StaleEpochError, match=f"load of rank 1: epoch {epoch}, want 2"):
            service.report_load(1, epoch, torch.ones(1, E))
    held = service.snapshot()
    assert held.alive == (1,) and not held.load_LE.any()


@pytest.mark.parametrize(
    ("load_LE", "said"),
    [
        (torch.ones(2, E), r"got \(2, 4\), want layers x experts \(1, 4\)"),
        (torch.ones(E), r"got \(4,\), want"),
        (torch.full((1, E), torch.nan), "got NaN, infinite or negative, want counts"),
        (torch.full((1, E), torch.inf), "got NaN, infinite or negative, want counts"),
        (torch.full((1, E), -1), "got NaN, infinite or negative, want counts"),
    ],
)
def test_a_report_that_is_no_count_is_refused(service, load_LE, said):
    with pytest.raises(GatingError, match=f"load of rank 0: {said}"):
        service.report_load(0, 1, load_LE)
    assert not service.snapshot().load_LE.any()


def test_a_new_placement_forgets_ranks_that_are_gone(service):
    for rank in (0, 1):
        service.report_load(rank, 1, torch.ones(1, E))
    held = publish(service, epoch=2, ranks=1)
    assert held.alive == (0,) and held.load_LE.tolist() == [[1.0] * E]
    deeper = publish(service, router(), router(layer=1), epoch=3, ranks=1)
    assert deeper.load_LE.tolist() == [[0.0] * E] * 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"decay": 1.0}, "decay: got 1.0, want 0 <= decay < 1"),
        ({"heartbeat_timeout_s": 0.0}, "heartbeat_timeout_s: got 0.0, want above 0 s"),
    ],
)
def test_settings_out_of_range_are_refused(options, said):
    with pytest.raises(GatingError, match=said):
        GatingService(**options)
