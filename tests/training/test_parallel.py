"""Who owns which parameter, and sums over ranks."""

import pytest
import torch
from torch import nn

from moe_router.training.loop import Trainer
from moe_router.training.parallel import Ownership, local_gradients
from tests.gloo import run_ranks
from tests.training import work


@pytest.mark.parametrize("bucket", [1, 20, 1 << 23])
def test_gradients_are_summed_whatever_the_buckets(bucket):
    shapes = [(3,), (0, 2), (4, 5), (2, 2)]
    counts = [torch.arange(torch.Size(shape).numel()).view(shape).float() for shape in shapes]
    wanted = [3 * count + 0 + 1 + 2 for count in counts]
    for grads in run_ranks(3, work.summed, shapes, bucket):
        assert all(torch.equal(g, w) for g, w in zip(grads, wanted, strict=True))


def test_experts_are_owned_and_the_rest_is_shared():
    trainer = Trainer(work.tiny({"frozen": True}))
    owned = Ownership.of(trainer.model)
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    assert [names[id(p)] for p in owned.apart] == [
        f"blocks.{i}.moe.experts.{leaf}" for i in (0, 1) for leaf in ("gate_up", "down")
    ]
    alike = {names[id(p)] for p in owned.alike}
    assert "embed.weight" in alike and not [name for name in alike if "router" in name]


def test_a_parameter_without_a_gradient_gets_zeros():
    model = nn.Linear(2, 3)
    model.weight.grad = torch.ones(3, 2)
    owned = Ownership.of(model)
    assert len(local_gradients(owned.alike)) == 1
    owned.fill_gradients()
    assert [g.sum().item() for g in local_gradients(owned.alike)] == [6.0, 0.0]


def test_a_rank_that_no_token_reaches_takes_the_same_step():
    moe = {"experts": 2, "top_k": 1, "renormalise": False, "balance_loss": 0.0, "bias_rate": 1e-9}
    config = work.tiny(moe)
    one = work.one_sided(0, 1, config)
    for part in run_ranks(2, work.one_sided, config):
        for name, tensor in part.items():
            torch.testing.assert_close(tensor, one[name], rtol=1e-4, atol=1e-6, msg=name)
