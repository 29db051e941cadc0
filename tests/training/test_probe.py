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
    with pytest.raises(ZeroDivisionError), watched(layers, Probe(torch.device("cpu"))):
        assert [layer.dispatcher for layer in layers] != before
        raise ZeroDivisionError
    assert [layer.dispatcher for layer in layers] == before


def test_nothing_dispatched_is_nothing_known():
    probe = Probe(torch.device("cpu"))
    assert probe.microseconds is None and probe.bytes is None
