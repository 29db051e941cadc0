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


def test_copies_of_experts_stay_equal_and_follow_the_curve_of_one(tmp_path):
    placement = ((0, 1, 2, 3, 6), (4, 6, 5, 7, 1))
    config = work.tiny({"bias_rate": 0.05})
    wanted, _, state = work.curve(0, 1, config, 4)
    parts = run_ranks(2, work.with_copies, config, placement, str(tmp_path), 4)
    for records, saved, restored_same in parts:
        assert restored_same
        for one, other in zip(records, wanted, strict=True):
            assert one.loss == pytest.approx(other.loss, rel=1e-5)
            assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-4)
        for name, tensor in saved.items():
            torch.testing.assert_close(tensor, state[name], rtol=2e-3, atol=2e-5)
    first, second = (saved for _, saved, _ in parts)
    shared = [name for name in first.keys() & second.keys() if ".experts." in name]
    assert {name.split(".experts.")[1][0] for name in shared} == {"1", "6"}
    assert all(torch.equal(first[name], second[name]) for name in shared)
    assert work.tensors_in(tmp_path / "step_4") == state.keys()
    one = work.restored(0, 1, config, tmp_path / "step_4", 0)[1]
    assert all(torch.equal(one[name], (first | second)[name]) for name in one)
