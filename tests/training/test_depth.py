"""Training with routing in depth: any number of ranks, FSDP2, exact resume, what is counted."""

import dataclasses

import pytest
import torch

from moe_router.observability.trace import load_trace
from moe_router.training.loop import Trainer
from tests.gloo import run_ranks
from tests.training import work
from tests.training.test_ranks import assert_same_curve

STEPS = 5
ROUTING = {
    # by position: the bytes of a sequence repeat, and rounding would decide between equal ones
    "skip": {"kind": "skip", "router": "position", "keep": 0.5, "predictor": "mlp"}
    | {"every": 1, "first": 0},
    "halt": {"kind": "halt", "threshold": 0.7, "start": -0.5, "every": 1, "first": 0}
    | {"budget": 0.6, "cost_loss": 0.1},
    "ponder": {"kind": "halt", "halting": "ponder", "threshold": 0.6, "start": 0.2}
    | {"soft_steps": 2, "every": 1, "first": 0},
    "leap": {"kind": "leap", "router": "position", "start": 0.0, "every": 1, "first": 0}
    | {"budget": 0.6},
}

RESUMED = ROUTING | {
    "tsa": {"kind": "halt", "halting": "tsa", "threshold": 0.6, "start": 0.2, "budget": 0.7}
    | {"soft_steps": 3, "router": "mlp", "router_hidden": 8, "every": 1, "first": 0},
    "early": ROUTING["skip"] | {"router": "linear", "decide_at": "early", "curriculum": 4},
}
LOSS = {"skip": "predictor", "halt": "ponder", "ponder": "ponder", "leap": "cost"}


def tiny(kind, **train):
    return work.tiny(model={"layers": 3, "routing": RESUMED[kind]}, **train)


@pytest.mark.parametrize("kind", ROUTING)
def test_two_ranks_follow_the_curve_of_one_also_sharded_and_recomputed(kind):
    records, held_out, state = work.curve(0, 1, tiny(kind), STEPS)
    assert records[-1].loss < records[0].loss - 0.1
    assert set(records[0].losses) >= {LOSS[kind], "balance"}
    share = records[-1].executed_flops / records[-1].dense_flops
    assert 0.3 < share < 0.95
    for train in ({}, {"dense": "fsdp", "activation_checkpointing": True}):
        parts = run_ranks(2, work.curve, tiny(kind, **train), STEPS)
        for ours, ours_held_out, _ in parts:
            assert_same_curve(ours, records)
            assert ours_held_out.bits_per_byte == pytest.approx(held_out.bits_per_byte, rel=1e-5)
        whole = {n: t for *_, part in parts for n, t in part.items()}
        assert whole.keys() == state.keys()


@pytest.mark.parametrize("kind", RESUMED)
def test_a_resume_is_exact(tmp_path, kind):
    straight, resumed = Trainer(tiny(kind)), Trainer(tiny(kind))
    for step in range(4):
        if step == 2:
            straight.save(tmp_path, wait=True)
        straight.train_step()
    resumed.restore(tmp_path / "step_2")
    for _ in range(2):
        resumed.train_step()
    ours, wanted = work.copies(resumed), work.copies(straight)
    assert ours.keys() == wanted.keys() and any(".router." in name for name in wanted)
    assert all(torch.equal(ours[name], wanted[name]) for name in wanted)


def test_recorded_steps_show_who_was_computed(tmp_path):
    config = work.tiny(model={"moe": None, "layers": 3, "routing": ROUTING["skip"]})
    run = dataclasses.replace(config.run, record=True, record_every=1)
    trainer = Trainer(dataclasses.replace(config, run=run), run_dir=tmp_path)
    record = trainer.train_step()
    trace = load_trace(tmp_path / "routing" / "step_1.rank_0.safetensors")
    assert trace.layers.keys() == {0, 1, 2}
    for layer in trace.layers.values():
        assert layer.groups == 1
        kept = (layer.target_TK >= 0).float().mean()
        assert 0.5 <= kept < 0.6  # half of each document, rounded up
    assert record.rows == 0 and record.load_LE == []
