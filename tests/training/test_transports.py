"""A step through static shapes is the step through host splits, also when it does not fit."""

import pytest
import torch

from tests.gloo import run_ranks
from tests.training import work
from tests.training.test_ranks import assert_same_curve

STATIC = ("padded", "gather_scatter", "peer_memory")
ONE_EACH = {"experts": 2, "top_k": 1, "renormalise": False, "balance_loss": 0.0}


@pytest.mark.parametrize("transport", STATIC)
@pytest.mark.parametrize("dense", ["replicated", "fsdp"])
def test_two_ranks_take_the_same_steps(transport, dense):
    """Up to the last bit: products over static rows may take their sums in another order."""
    train = {"accumulation": 3, "activation_checkpointing": True, "dense": dense}
    moe = {"shared_hidden": 8}
    ours = run_ranks(2, work.curve, work.tiny(moe, cluster={"transport": transport}, **train), 3)
    wanted = run_ranks(2, work.curve, work.tiny(moe, **train), 3)
    for (records, held_out, state), (other, other_held_out, other_state) in zip(
        ours, wanted, strict=True
    ):
        assert_same_curve(records, other)
        assert held_out.loss == pytest.approx(other_held_out.loss, rel=1e-5)
        for name, tensor in other_state.items():
            torch.testing.assert_close(state[name], tensor, rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("transport", STATIC)
@pytest.mark.parametrize("hot", [0, 1])
def test_a_step_that_does_not_fit_is_taken_again_by_host_splits(transport, hot):
    """All tokens choose the expert of one rank. `padded` and `peer_memory` find no slots on
    either rank, `gather_scatter` too few rows on the hot one alone: both take the step again."""
    moe = {"experts": 2, "top_k": 1, "renormalise": False, "balance_loss": 0.0, "bias_rate": 1e-9}
    exact = run_ranks(2, work.leaning, work.tiny(moe), hot)
    tight, wide = (
        run_ranks(2, work.leaning, work.tiny(moe, cluster=cluster), hot)
        for cluster in ({"transport": transport, "row_bound": bound} for bound in (1.0, 2.0))
    )
    for (repeated, ours, state), (_, wanted, wanted_state) in zip(tight, exact, strict=True):
        assert repeated == 3 and ours == wanted
        assert all(torch.equal(state[name], wanted_state[name]) for name in wanted_state)
    assert [part[0] for part in wide] == [0, 0]


@pytest.mark.parametrize("transport", STATIC)
def test_evaluation_loses_no_row(transport):
    """Its batches differ in length from those of training, and nobody would take them again."""
    tight = work.tiny({"top_k": 1}, cluster={"transport": transport, "row_bound": 1.0})
    exact = run_ranks(2, work.curve, work.tiny({"top_k": 1}), 0)
    for (_, quality, _), (_, wanted, _) in zip(
        run_ranks(2, work.curve, tight, 0), exact, strict=True
    ):
        assert quality == wanted
