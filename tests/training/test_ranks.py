"""The same curve for any number of ranks, and for every way to hold the same numbers."""

import pytest
import torch

from tests.gloo import run_ranks
from tests.training import work

STEPS = 6
VARIANTS = {
    "plain": {},
    "everything": {
        "moe": {
            "score": "sigmoid",
            "bias_rate": 0.05,
            "jitter": 0.1,
            "z_loss": 0.01,
            "sequence_balance_loss": 0.01,
            "expert_groups": 4,
            "top_groups": 2,
            "null_experts": 1,
            "shared_hidden": 16,
        },
        "accumulation": 3,
    },
}


def assert_same_curve(ours, wanted):
    for one, other in zip(ours, wanted, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-5)
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-4)
        assert one.losses == pytest.approx(other.losses, rel=1e-5)
        assert one.load_LE == other.load_LE
        assert (one.tokens, one.rows, one.dropped) == (other.tokens, other.rows, other.dropped)
        assert (one.executed_flops, one.dense_flops) == (other.executed_flops, other.dense_flops)


@pytest.mark.parametrize("name", VARIANTS)
def test_two_and_four_ranks_follow_the_curve_of_one(name):
    config = work.tiny(**VARIANTS[name])
    records, held_out, state = work.curve(0, 1, config, STEPS)
    assert records[-1].loss < records[0].loss - 0.2
    for ranks in (2, 4):
        parts = run_ranks(ranks, work.curve, config, STEPS)
        for ours, ours_held_out, _ in parts:
            assert_same_curve(ours, records)
            assert ours_held_out.bits_per_byte == pytest.approx(held_out.bits_per_byte, rel=1e-5)
        whole = {n: t for *_, part in parts for n, t in part.items()}
        assert whole.keys() == state.keys()
        for tensor_name, tensor in state.items():
            torch.testing.assert_close(whole[tensor_name], tensor, rtol=2e-3, atol=2e-5)


def test_all_ranks_report_the_same_step():
    (one, *_), (other, *_) = run_ranks(2, work.curve, work.tiny(), 2)
    assert [r.loss for r in one] == [r.loss for r in other]
    assert [r.grad_norm for r in one] == [r.grad_norm for r in other]


def test_dense_parameters_under_fsdp_follow_the_curve_of_replicated_ones():
    parts = run_ranks(2, work.curve, work.tiny(dense="fsdp"), STEPS)
    records, _, state = work.curve(0, 1, work.tiny(), STEPS)
    assert_same_curve(parts[0][0], records)
    for name, tensor in parts[0][2].items():
        torch.testing.assert_close(tensor, state[name], rtol=2e-3, atol=2e-5)


def test_accumulation_is_the_same_step_in_less_memory():
    """Dropless and with losses that are linear in the batch; the balance loss is per micro-step."""
    moe = {"balance_loss": 0.0, "z_loss": 0.01}
    one = work.curve(0, 1, work.tiny(moe), STEPS)[0]
    three = work.curve(0, 1, work.tiny(moe, accumulation=3), STEPS)[0]
    assert_same_curve(three, one)


@pytest.mark.parametrize("ranks", [1, 2])
def test_activation_checkpointing_changes_no_bit(ranks):
    moe = {"jitter": 0.1}
    kept = run_ranks(ranks, work.curve, work.tiny(moe), 3)
    again = run_ranks(ranks, work.curve, work.tiny(moe, activation_checkpointing=True), 3)
    for (ours, _, state), (wanted, _, wanted_state) in zip(again, kept, strict=True):
        assert_same_curve(ours, wanted)
        assert all(torch.equal(state[name], wanted_state[name]) for name in wanted_state)


def test_with_capacity_rows_are_dropped_and_counted():
    records = work.curve(0, 1, work.tiny({"capacity_factor": 0.5}), 2)[0]
    for record in records:
        assert record.dropped > 0.3 * record.rows
        kept = record.rows - record.dropped
        assert record.executed_flops / record.dense_flops == pytest.approx(kept / record.rows)


def test_a_frozen_router_stays_as_it_was_born():
    config = work.tiny({"frozen": True})
    state = work.curve(0, 1, config, 3)[2]
    born = work.curve(0, 1, config, 0)[2]
    moved = [
        n for n in born if not n.startswith("optimizer") and not torch.equal(state[n], born[n])
    ]
    assert moved and not [name for name in moved if "router" in name]
    assert not [name for name in state if name.startswith("optimizer") and "router" in name]


def test_the_first_cause_of_a_nan_is_named_and_nothing_is_changed():
    for ranks in (1, 2):
        for name in ("blocks.1.attention.k.weight", "blocks.0.moe.experts.down"):
            for message, same, step in run_ranks(ranks, work.poisoned, work.tiny(), name):
                assert f"the first that is not finite is the weight {name}" in message
                assert (
                    message.startswith("step 2: loss ") and "weights are those of step 1" in message
                )
                assert same and step == 1


def test_a_diverging_run_stops_with_one_line():
    from moe_router.errors import NonFiniteError
    from moe_router.training.loop import Trainer

    trainer = Trainer(work.tiny(lr=1e30, warmup=0, clip_norm=0.0))
    with pytest.raises(NonFiniteError, match=r"^step \d: loss \S+, gradient norm \S+; the first "):
        for _ in range(5):
            trainer.train_step()
