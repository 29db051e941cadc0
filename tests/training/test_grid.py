"""Ranks as a grid, W = EP x DP: the curve of one rank, every expert counted and written once."""

import pytest
import torch

from moe_router.cost import cost
from moe_router.errors import ConfigError
from moe_router.training.loop import Trainer
from tests.gloo import run_ranks
from tests.training import work
from tests.training.test_ranks import STEPS, VARIANTS, assert_same_curve


def held(rank, ranks, config):
    """Global ids of the experts of this rank, and of those it writes."""
    moe = Trainer(config, rank=rank, ranks=ranks).model.blocks[0].moe
    slots = moe.placement.first_slots(rank)
    experts = moe.placement.experts_of_rank[rank]
    return experts, [experts[slot] for slot in slots], moe.experts.down.size(0)


def grid(ranks, row, name="everything", **train):
    cluster = {"actors": ranks, "expert_ranks": row, "transport": train.pop("transport", "padded")}
    return work.tiny(VARIANTS[name].get("moe"), cluster=cluster, **{"batch": 12} | train)


def assert_follows_one(ranks, config):
    alone = work.tiny(VARIANTS["everything"]["moe"], batch=config.train.batch)
    records, held_out, state = work.curve(0, 1, alone, STEPS)
    for ours, ours_held_out, part in run_ranks(ranks, work.curve, config, STEPS):
        assert_same_curve(ours, records)
        assert ours_held_out.bits_per_byte == pytest.approx(held_out.bits_per_byte, rel=1e-5)
        for name, tensor in part.items():  # copies too
            torch.testing.assert_close(tensor, state[name], rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("dense", ["replicated", "fsdp"])
def test_two_ranks_that_each_hold_all_experts_follow_the_curve_of_one(dense):
    assert_follows_one(2, grid(2, 1, dense=dense))


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["all_to_all", "padded", "gather_scatter", "peer_memory"])
@pytest.mark.parametrize("dense", ["replicated", "fsdp"])
def test_two_by_two_ranks_follow_the_curve_of_one(dense, transport):
    assert_follows_one(4, grid(4, 2, dense=dense, transport=transport))


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["all_to_all", "peer_memory"])
@pytest.mark.parametrize("row", [8, 4, 2])
def test_eight_ranks_as_any_grid_follow_the_curve_of_one(row, transport):
    """EP x DP of (8, 1), (4, 2) and (2, 4)."""
    assert_follows_one(8, grid(8, row, transport=transport, batch=16))


def test_a_row_shares_the_experts_and_the_first_row_speaks_for_them():
    found = run_ranks(4, held, grid(4, 2))
    low, high = (0, 1, 2, 3), (4, 5, 6, 7)
    assert [experts for experts, _, _ in found] == [low, high, low, high]
    assert [list(said) for _, said, _ in found] == [list(low), list(high), [], []]
    assert [rows for *_, rows in found] == [4] * 4


def test_what_no_row_divides_is_one_row():
    """Fewer ranks that go on after a loss."""
    config = grid(4, 4)
    assert [experts for experts, _, _ in run_ranks(2, held, config)] == [(0, 1, 2, 3), (4, 5, 6, 7)]


def written(rank, ranks, config, folder):
    trainer = Trainer(config, rank=rank, ranks=ranks)
    trainer.train_step()
    trainer.save(folder, wait=True)
    return work.copies(trainer)


def test_a_checkpoint_holds_each_expert_once_and_any_grid_reads_it(tmp_path):
    config = grid(2, 1, "plain", dense="fsdp")
    first, second = run_ranks(2, written, config, tmp_path)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert work.tensors_in(tmp_path / "step_1") == first.keys()
    read = run_ranks(2, work.restored, grid(2, 2, "plain"), tmp_path / "step_1", 0)
    for _, part, *_ in read:
        assert all(torch.equal(part[name], first[name]) for name in part)


def test_a_row_that_does_not_divide_is_refused_and_a_row_holds_more():
    with pytest.raises(ConfigError, match=r"expert_ranks.*3.*divisor of 4 \(cluster\.actors\)"):
        grid(4, 3)
    assert cost(grid(4, 2)).bytes_per_rank > cost(grid(4, 4)).bytes_per_rank
