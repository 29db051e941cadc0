"""The MoE layer by the fused kernel against the layer by the reference, on a GPU or interpreted."""

import os

import pytest
import torch

from moe_router import MoE, MoEConfig
from moe_router.errors import ConfigError
from moe_router.routing import Context, PlanMemory

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1", allow_module_level=True)
fused_gate = pytest.importorskip("moe_router_kernels.fused_gate")
DEVICE = "cpu" if INTERPRETED else "cuda"
VARIANTS = {
    "softmax": {"z_loss": 0.1},
    "sigmoid_bias": {"score": "sigmoid", "bias_rate": 0.1, "scale": 2.0},
    "null": {"null_experts": 3, "balance_loss": 0.5},
    "sequence": {"sequence_balance_loss": 0.3},
    "capacity": {"capacity_factor": 0.7},
    "expert_choice": {"policy": "expert_choice", "balance_loss": 0.5},
    "groups": {"expert_groups": 4, "top_groups": 2, "score": "sigmoid", "bias_rate": 0.1},
    "straight_through": {"straight_through": True, "jitter": 0.3},
}


def layer(kernels, **variant):
    torch.manual_seed(0)
    config = MoEConfig(experts=8, top_k=2, hidden=12, **variant)
    return MoE(16, config, kernels=kernels).to(DEVICE)


def result(moe, x, memory=None):
    leaf = x.clone().requires_grad_()
    routed = moe(leaf, Context(memory=memory))
    loss = routed.delta_TD.square().sum() + moe.aux_loss(routed.choice)
    return routed, torch.autograd.grad(loss, [leaf, *moe.parameters()])


@pytest.fixture
def launches(monkeypatch):
    """What the kernel was asked: to decide, or to weigh what is given."""
    seen = []
    inner = fused_gate.gate

    def gate(*args, **more):
        seen.append("weigh" if more.get("given_TK") is not None else "decide")
        return inner(*args, **more)

    monkeypatch.setattr(fused_gate, "gate", gate)
    return seen


@pytest.mark.parametrize("name", VARIANTS)
def test_equals_the_reference(name, launches):
    x = torch.randn(3, 15, 16, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    ours, grads = result(layer("triton", **VARIANTS[name]), x)
    asked = "weigh" if name == "expert_choice" else "decide"
    assert launches == [asked]
    wanted, wanted_grads = result(layer("reference", **VARIANTS[name]), x)
    assert launches == [asked]
    assert torch.equal(ours.choice.target_TK, wanted.choice.target_TK)
    for field in ("src_R", "choice_R", "offsets_G1", "row_TK"):
        assert torch.equal(getattr(ours.plan, field), getattr(wanted.plan, field)), field
    for loss, value in ours.choice.losses.items():
        torch.testing.assert_close(value, wanted.choice.losses[loss])
    for one, other in zip(grads, wanted_grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_recomputing_takes_the_saved_decision(launches):
    moe, memory = layer("triton"), PlanMemory()
    x = torch.randn(9, 16).to(DEVICE)
    first, _ = result(moe, x, memory)
    moe.router.score.weight.data.neg_()
    again, _ = result(moe, x, memory)
    assert launches == ["decide", "weigh"] and again.plan is first.plan
    assert torch.equal(again.choice.target_TK, first.choice.target_TK)


def test_what_the_kernel_does_not_cover_is_left_to_the_reference(launches):
    uneven = {"expert_groups": 4, "top_groups": 2, "null_experts": 1}
    result(layer("triton", **uneven), torch.randn(6, 16).to(DEVICE))
    assert not launches
    result(layer("triton", policy="expert_choice"), torch.randn(6, 16).to(DEVICE))
    assert launches == ["weigh"]


def test_no_tokens(launches):
    routed = layer("triton")(torch.zeros(0, 16, device=DEVICE))
    assert routed.delta_TD.shape == (0, 16) and launches == ["decide"]


def test_triton_where_it_does_not_run_says_so(monkeypatch):
    monkeypatch.setattr("moe_router.routing.router.runs_triton", lambda device: False)
    with pytest.raises(ConfigError, match=r"kernels=triton on .*set kernels=auto"):
        layer("triton")(torch.zeros(2, 16, device=DEVICE))
