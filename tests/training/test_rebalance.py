"""Experts that move while a run goes on: by the load, with their moments, and back if worse."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_router.errors import ConfigError
from moe_router.placement import Placement
from moe_router.training.loop import Trainer
from moe_router.training.migrate import plan_moves
from moe_router.training.parallel import moe_layers
from tests.gloo import run_ranks
from tests.training import work

SPARE = {"actors": 2, "rebalance": {"every": 1000, "spare": 1}}
FAVOURITES = (2, 6)  # of the layers; each begins without a copy
MOVED = (  # of the two layers, eight experts in five slots on two ranks
    Placement(((7, 3, 5, 1, 0), (2, 0, 6, 4, 7))),
    Placement(((4, 5, 6, 7, 0), (3, 2, 1, 0, 4))),
)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def moving(rank, ranks, config, at, steps, folder=None):
    """Steps, and experts that move after `at` of them: records, the state just before and after,
    at the end, and how many slots got another expert."""
    trainer = Trainer(config, rank=rank, ranks=ranks)
    records = [trainer.train_step() for _ in range(at)]
    before = work.copies(trainer)
    moved = trainer.move_experts(MOVED)
    after = work.copies(trainer)
    if folder is not None:
        trainer.save(folder, wait=True)
    records += [trainer.train_step() for _ in range(steps - at)]
    return records, before, after, work.copies(trainer), moved


def test_experts_move_with_their_moments_and_the_curve_is_that_of_a_run_that_never_moved():
    wanted, _, state = work.curve(0, 1, work.tiny({"bias_rate": 0.05}), 6)
    parts = run_ranks(2, moving, work.tiny({"bias_rate": 0.05}, cluster=SPARE), 3, 6)
    befores, afters, ends = ([part[i] for part in parts] for i in (1, 2, 3))
    assert same(befores[0] | befores[1], afters[0] | afters[1])  # bit for bit, moments too
    assert any(befores[0].keys() - afters[0].keys()) and parts[0][4] == parts[1][4] == 10
    for records, *_ in parts:
        for ours, theirs in zip(records, wanted, strict=True):
            assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)
            assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-4)
    for end in ends:
        for name, tensor in end.items():
            torch.testing.assert_close(tensor, state[name], rtol=2e-3, atol=2e-5)
    assert same(*({n: end[n] for n in ends[0].keys() & ends[1].keys()} for end in ends))


def test_a_moved_run_equals_the_same_ranks_that_never_moved():
    config = work.tiny(cluster=SPARE)
    stayed = run_ranks(2, work.curve, config, 5)
    moved = run_ranks(2, moving, config, 2, 5)
    whole = stayed[0][2] | stayed[1][2]
    for part in moved:
        for name, tensor in part[3].items():
            if not name.startswith("optimizer"):
                torch.testing.assert_close(tensor, whole[name], rtol=1e-5, atol=1e-6, msg=name)


def resumed(rank, ranks, config, step_dir, steps):
    trainer = Trainer(config, rank=rank, ranks=ranks)
    trainer.restore(step_dir)
    placements = [moe.placement for moe in moe_layers(trainer.model)]
    first = work.copies(trainer)
    for _ in range(steps):
        trainer.train_step()
    return placements, first, work.copies(trainer)


def test_a_checkpoint_remembers_who_holds_what_and_any_ranks_read_it(tmp_path):
    config = work.tiny(cluster=SPARE)
    straight = run_ranks(2, moving, config, 2, 4, tmp_path)
    again = run_ranks(2, resumed, config, tmp_path / "step_2", 2)
    for (_, _, saved, end, _), (placements, first, last) in zip(straight, again, strict=True):
        assert placements == list(MOVED)
        assert same(first, saved) and same(last, end)  # bit for bit
    whole = straight[0][2] | straight[1][2]
    for ranks, cluster in ((1, {}), (3, SPARE | {"actors": 3}), (2, {})):
        parts = run_ranks(ranks, resumed, work.tiny(cluster=cluster), tmp_path / "step_2", 0)
        read = {name: tensor for _, part, _ in parts for name, tensor in part.items()}
        assert same(read, whole)
        assert parts[0][0][0] != MOVED[0]


def leaning(rank, ranks, config, steps):
    """Steps in which each layer has another favourite: placements, and what the looks said."""
    trainer = Trainer(config, rank=rank, ranks=ranks)
    for favourite, moe in zip(FAVOURITES, moe_layers(trainer.model), strict=True):
        moe.router.bias_E[favourite] = 10.0
    said, loads = [], []
    for _ in range(steps):
        loads.append(trainer.train_step().load_LE)
        said.append(trainer.rebalanced)
    return [moe.placement for moe in moe_layers(trainer.model)], said, loads


def test_each_layer_is_placed_by_its_own_load():
    moe = {"bias_rate": 1e-9, "balance_loss": 0.0}
    rebalance = {"every": 3, "spare": 1, "decay": 0.5}
    config = work.tiny(moe, cluster={"actors": 2, "rebalance": rebalance}, lr=1e-6)
    one, other = run_ranks(2, leaning, config, 4)
    assert one == other
    placements, said, loads = one
    assert [each is None for each in said] == [True, True, False, True]
    assert (said[2].step, said[2].rolled_back) == (3, False)
    assert said[2].moved > 0 and said[2].straggler_us > 0
    for layer, placement in enumerate(placements):
        assert len(placement.copies()[FAVOURITES[layer]]) == 2  # everybody's expert is on both
        load_E = loads[-1][layer]
        ours = placement.load_of_ranks(load_E)
        dealt = Placement.dealt(8, 2, 5).load_of_ranks(load_E)
        assert max(ours) < 0.9 * max(dealt)
    assert placements[0] != placements[1]


def looks(rank, ranks, config, times):
    """The placements and the state after each of some looks whose expert times are given: what a
    clock says cannot be repeated, so here it is told."""
    trainer = Trainer(config, rank=rank, ranks=ranks)
    trainer.train_step()
    trainer._rebalancer.restore(None)
    load_LE = torch.ones(2, 8, dtype=torch.float64)
    load_LE[:, 3] = 20.0
    found = []
    for look, microseconds in enumerate(times):
        # the other rank is quick: the slow one counts; one step of three is a hiccup
        mine = microseconds if rank == 1 else 1.0
        for step, hiccup in ((3 * look + 1, 1e6), (3 * look + 2, 0.0), (3 * look + 3, 0.0)):
            said = trainer._rebalancer.after_step(step, load_LE, [mine + hiccup] * 2)
        where = [moe.placement for moe in moe_layers(trainer.model)]
        found.append((where, said, work.copies(trainer)))
    return found


def test_a_placement_that_made_the_slowest_rank_slower_is_taken_back_and_not_tried_again():
    config = work.tiny(cluster={"actors": 2, "rebalance": {"every": 3, "spare": 1}})
    for found in run_ranks(2, looks, config, [100.0, 150.0, 100.0]):
        (moved, first, _), (back, second, _), (stays, third, _) = found
        assert not first.rolled_back and first.straggler_us == 200.0
        assert second.rolled_back and (second.before_us, second.straggler_us) == (200.0, 300.0)
        assert second.moved == first.moved and first.before_us is None
        assert moved != back == [Placement.dealt(8, 2, 5)] * 2
        assert third is None and stays == back
    one, other = run_ranks(2, looks, config, [100.0, 104.0])
    assert one[1][0] == one[0][0] == other[1][0]  # noise is no reason
    kept = one[1][1]
    assert (kept.moved, kept.rolled_back, kept.facts()["before_us"]) == (0, False, 200)
    states = [one[0][2] | other[0][2], one[1][2] | other[1][2]]
    assert same(*states)


@st.composite
def two_placements(draw):
    experts, ranks = draw(st.integers(1, 8)), draw(st.integers(1, 4))
    slots = draw(st.integers(-(-experts // ranks), experts))
    loads = st.lists(st.floats(0, 9), min_size=experts, max_size=experts)
    return tuple(Placement.balanced(draw(loads), ranks, slots) for _ in range(2))


@settings(max_examples=15)
@given(two_placements())
def test_whatever_moves_every_slot_gets_its_expert(placements):
    old, new = placements
    plans = [plan_moves(old, new, rank) for rank in range(old.ranks)]
    for rank, plan in enumerate(plans):
        here = list(old.experts_of_rank[rank])
        for source, other in enumerate(plans):
            sent = [old.experts_of_rank[source][slot] for slot in other.send[rank]]
            assert len(sent) == plan.receive[source]
            here += sent
        assert tuple(here[i] for i in plan.take) == new.experts_of_rank[rank]
        stay = set(old.experts_of_rank[rank]) & set(new.experts_of_rank[rank])
        assert sum(plan.receive) == len(new.experts_of_rank[rank]) - len(stay)


@pytest.mark.parametrize(
    "cluster, message",
    [
        ({"rebalance": {"every": 0}}, "cluster.rebalance.every=0: want at least 1 step"),
        ({"rebalance": {"spare": -1}}, "cluster.rebalance.spare=-1: want 0 or more slots"),
        ({"rebalance": {"decay": 1.0}}, "cluster.rebalance.decay=1.0: want 0 <= decay < 1"),
        (
            {"actors": 2, "expert_ranks": 1, "rebalance": {}},
            "cluster.expert_ranks=1: want null, for cluster.rebalance",
        ),
    ],
)
def test_what_cannot_be_rebalanced_is_refused(cluster, message):
    with pytest.raises(ConfigError) as refused:
        work.tiny(cluster=cluster)
    assert message in str(refused.value)


def test_a_model_without_experts_has_nothing_to_rebalance():
    with pytest.raises(ConfigError, match=r"cluster\.rebalance=a section: want null, for model\.m"):
        work.tiny(model={"moe": None}, cluster={"rebalance": {}})
