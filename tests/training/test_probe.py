"""What the probe says of a step, against what must have arrived."""

import pytest
import torch

from moe_router.training.loop import Trainer
from moe_router.training.parallel import moe_layers
from moe_router.training.probe import Probe, watched
from tests.gloo import run_ranks
from tests.training import work


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("recompute", [False, True])
def test_every_forward_pass_is_counted_once(ranks, recompute):
    config = work.tiny(moe={"top_k": 8}, accumulation=2, activation_checkpointing=recompute)
    curves = run_ranks(ranks, work.curve, config, 2)
    for records, _, _ in curves:
        for record in records:
            # with top_k = E each rank holds a row of every token: layers, rows of 32 tokens, D
            assert record.dispatch_bytes == 2 * 12 * 32 * 32 * 4
            assert 0 < record.dispatch_us < record.seconds * 1e6


def test_the_layers_are_as_before_also_after_an_error():
    trainer = Trainer(work.tiny())
    layers = moe_layers(trainer.model)
    before = [layer.dispatcher for layer in layers]
    with pytest.raises(ZeroDivisionError), watched(layers, Probe(torch.device("cpu"), 2)):
        assert [layer.dispatcher for layer in layers] != before
        raise ZeroDivisionError
    assert [layer.dispatcher for layer in layers] == before
    assert not any(layer.experts._forward_hooks for layer in layers)


def timed(rank, ranks, config):
    """What each layer's experts took in a step, and the step."""
    trainer = Trainer(config, rank=rank, ranks=ranks)
    tally, *_ = trainer._gradients([trainer._micro(0)])
    return tally.probe.expert_us_L, tally.probe.microseconds


def test_experts_are_timed_apart_layer_by_layer():
    config = work.tiny(moe={"hidden": 2048}, batch=24)
    for expert_us_L, dispatch_us in run_ranks(2, timed, config):
        assert len(expert_us_L) == 2 and min(expert_us_L) > 0 and dispatch_us > 0
    few, many = (
        sum(timed(0, 1, work.tiny(moe={"hidden": hidden}))[0][1] for _ in range(3))
        for hidden in (16, 2048)
    )
    assert many > 3 * few


def test_nothing_dispatched_is_nothing_known():
    probe = Probe(torch.device("cpu"))
    assert probe.microseconds is None and probe.bytes is None
