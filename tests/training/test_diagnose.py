"""After a NaN: the cause, not what it spread to."""

import pytest
import torch

from moe_router.errors import NonFiniteError
from moe_router.training.loop import Trainer
from tests.gloo import run_ranks
from tests.training import work


def message_of(trainer):
    with pytest.raises(NonFiniteError) as raised:
        trainer.train_step()
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_layer_whose_output_overflows_is_named():
    trainer = Trainer(work.tiny())
    trainer.model.blocks[1].mlp_norm.weight.data.fill_(3e38)  # finite; what comes out is not
    assert "not finite is the output of blocks.1.mlp_norm; the weights are those of step 0" in (
        message_of(trainer)
    )


@pytest.mark.parametrize(
    "name", ["blocks.0.attention.o.weight", "blocks.1.moe.experts.down", "norm.weight"]
)
def test_a_gradient_is_blamed_where_it_began(name):
    trainer = Trainer(work.tiny())
    before = work.copies(trainer)
    parameter = dict(trainer.model.named_parameters())[name]
    hook = parameter.register_hook(lambda grad: grad * torch.inf)
    assert f"not finite is the gradient of {name}; the weights" in message_of(trainer)
    after = work.copies(trainer)
    assert trainer.step == 0 and all(torch.equal(before[n], after[n]) for n in before)
    assert all(p.grad is None for p in trainer.model.parameters())
    hook.remove()
    assert trainer.train_step().step == 1  # what was left behind does no harm


def test_a_poisoned_backward_pass_is_blamed_on_the_layer_it_comes_from():
    trainer = Trainer(work.tiny())
    query = trainer.model.blocks[1].attention.q  # blocks before it catch it from there
    query.register_full_backward_hook(lambda module, into, out: (into[0] * torch.nan,))
    assert "not finite is the gradient of blocks.1.attention_norm.weight;" in message_of(trainer)


@pytest.mark.parametrize("dense", ["replicated", "fsdp"])
def test_all_ranks_name_what_one_of_them_saw(dense):
    config = work.tiny(dense=dense)
    for message in run_ranks(2, work.overflowing, config):
        assert "loss nan" in message
        assert "not finite is the output of blocks.0.moe.experts; the weights" in message


def test_the_last_good_checkpoint_stays(tmp_path):
    trainer = Trainer(work.tiny())
    trainer.train_step()
    trainer.save(tmp_path, wait=True)
    good = work.copies(trainer)
    trainer.model.norm.weight.data.fill_(torch.nan)
    assert "is the weight norm.weight" in message_of(trainer)
    trainer.restore(tmp_path / "step_1")
    restored = work.copies(trainer)
    assert all(torch.equal(good[name], restored[name]) for name in good)
    assert trainer.train_step().step == 2
