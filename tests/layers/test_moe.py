import dataclasses

import pytest
import torch
import torch.nn.functional as F

from moe_router import Context, Ledger, MoE, MoEConfig, Tokens
from moe_router.errors import ConfigError
from moe_router.placement import Placement
from moe_router.routing import PlanMemory

VARIANTS = {
    "softmax": {},
    "sigmoid": {"score": "sigmoid"},
    "no_renormalise": {"renormalise": False, "scale": 1.5},
    "grouped": {"expert_groups": 4, "top_groups": 2},
    "bias": {"bias_rate": 0.1},
    "null": {"null_experts": 3},
    "mlp": {"router": "mlp", "router_hidden": 8},
    "shared": {"shared_hidden": 10},
    "straight_through": {"straight_through": True},
    "drop_position": {"capacity_factor": 0.7},
    "drop_score": {"capacity_factor": 0.7, "drop": "score"},
    "expert_choice": {"policy": "expert_choice", "capacity_factor": 1.5},
    "jitter": {"jitter": 0.2},
}
CAUSAL = [name for name in VARIANTS if name != "expert_choice"]


def layer(**variant):
    torch.manual_seed(0)
    config = MoEConfig(experts=8, top_k=2, hidden=6, **variant)
    return MoE(10, config).double()


def masked_dense(moe, x_TD, choice, plan):
    """The definition: every expert computes every token, a mask picks."""
    delta_TD = torch.zeros_like(x_TD)
    for e in range(moe.config.experts):
        gate, up = (x_TD @ moe.experts.gate_up[e].T).chunk(2, -1)
        y_TD = (F.silu(gate) * up) @ moe.experts.down[e].T
        taken_TK = (choice.target_TK == e) & (plan.row_TK >= 0)
        delta_TD = delta_TD + (choice.weight_TK * taken_TK).sum(-1, keepdim=True) * y_TD
    return delta_TD + (moe.shared(x_TD) if moe.shared else 0)


@pytest.mark.parametrize("name", VARIANTS)
def test_gathered_equals_masked_dense_forward_and_backward(name):
    moe = layer(**VARIANTS[name])
    x_TD = torch.randn(24, 10, dtype=torch.float64, requires_grad=True)
    wanted_from = torch.randn(24, 10, dtype=torch.float64)
    routed = moe(x_TD)
    wanted = masked_dense(moe, x_TD, routed.choice, routed.plan)
    torch.testing.assert_close(routed.delta_TD, wanted, rtol=1e-6, atol=1e-7)
    inputs = [x_TD, *moe.parameters()]
    grads, wanted_grads = (
        torch.autograd.grad((delta * wanted_from).sum(), inputs, retain_graph=True)
        for delta in (routed.delta_TD, wanted)
    )
    for ours, theirs in zip(grads, wanted_grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_suffix_never_changes_the_prefix_for_causal_choices(name):
    moe = layer(**VARIANTS[name])
    x = torch.randn(3, 8, 10, dtype=torch.float64)
    other = torch.cat([x[:, :5], torch.randn(3, 3, 10, dtype=torch.float64)], 1)
    # fp64, but not its last bit: a matrix product rounds by how many rows it has
    same = torch.allclose(moe(x).delta_TD[:, :5], moe(other).delta_TD[:, :5], rtol=1e-12)
    assert moe.causal == (name in CAUSAL)
    # dropping by score serves a heavy late token first: its training is not causal
    assert same == (name not in ("expert_choice", "drop_score"))


def test_eval_is_dropless_and_does_not_see_the_rest_of_the_batch():
    moe = layer(capacity_factor=0.3).eval()
    x = torch.randn(4, 6, 10, dtype=torch.float64)
    together = moe(x)
    assert together.plan.offsets_G1[-1] == 4 * 6 * 2
    torch.testing.assert_close(together.delta_TD[1:2], moe(x[1:2]).delta_TD)


def test_the_ledger_counts_rows_that_ran():
    moe = layer(capacity_factor=0.5)
    ledger = Ledger()
    routed = moe(torch.randn(16, 10, dtype=torch.float64), Context(ledger=ledger))
    kept = int((routed.plan.row_TK >= 0).sum())
    assert kept < 32 and ledger.totals() == (kept * 6 * 10 * 6, 32 * 6 * 10 * 6)


def test_recomputing_takes_the_saved_plan_and_tells_nobody_twice():
    moe = layer(jitter=0.5)
    seen = []
    ledger = Ledger()
    context = Context(ledger=ledger, observe=lambda *told: seen.append(told), memory=PlanMemory())
    x_TD = torch.randn(16, 10, dtype=torch.float64)
    first = moe(x_TD, context)
    moe.router.score.weight.data.neg_()
    again = moe(x_TD, context)
    assert torch.equal(first.choice.target_TK, again.choice.target_TK)
    assert again.plan is first.plan
    assert len(seen) == 1 and seen[0][0] == 0 and ledger.totals()[1] == 32 * 6 * 10 * 6


def test_no_tokens_is_no_work():
    moe = layer()
    x = torch.randn(0, 10, dtype=torch.float64, requires_grad=True)
    tokens = Tokens(x, torch.zeros(0, dtype=torch.int32), torch.zeros(1, dtype=torch.int32))
    routed = moe(tokens)
    (routed.delta_TD.sum() + moe.aux_loss(routed.choice)).backward()
    assert routed.delta_TD.shape == (0, 10) and moe.experts.down.grad.abs().sum() == 0


def test_aux_loss_is_scaled_and_reaches_the_router():
    moe = layer(balance_loss=0.5, z_loss=0.25)
    routed = moe(torch.randn(16, 10, dtype=torch.float64))
    losses = routed.choice.losses
    wanted = 0.5 * losses["balance"] + 0.25 * losses["z"]
    torch.testing.assert_close(moe.aux_loss(routed.choice), wanted)
    moe.aux_loss(routed.choice).backward()
    assert moe.router.score.weight.grad.norm() > 0 and moe.experts.down.grad is None


def test_bf16_keeps_the_router_in_fp32():
    torch.manual_seed(0)
    moe = MoE(16, MoEConfig(experts=8, top_k=2, hidden=16))
    x = torch.randn(12, 16)
    with torch.autocast("cpu", torch.bfloat16):
        low = moe(x.bfloat16())
    assert low.delta_TD.dtype == torch.bfloat16 and low.choice.weight_TK.dtype == torch.float32
    exact = moe(x.bfloat16().float())
    assert torch.equal(low.choice.target_TK, exact.choice.target_TK)
    torch.testing.assert_close(low.delta_TD.float(), exact.delta_TD, rtol=3e-2, atol=3e-2)


def test_a_bf16_module_needs_no_autocast_and_its_router_is_fp32():
    moe = MoE(16, MoEConfig(experts=8, top_k=2, hidden=16, router="mlp")).bfloat16()
    routed = moe(torch.randn(12, 16).bfloat16())
    assert routed.delta_TD.dtype == torch.bfloat16
    assert routed.choice.weight_TK.dtype == torch.float32


def test_reference_kernels_give_the_same_layer():
    torch.manual_seed(0)
    config = MoEConfig(experts=8, top_k=2, hidden=16)
    fast, slow = MoE(16, config), MoE(16, config, kernels="reference")
    slow.load_state_dict(fast.state_dict())
    x = torch.randn(30, 16)
    torch.testing.assert_close(fast(x).delta_TD, slow(x).delta_TD)


@pytest.mark.parametrize(
    "name", ["softmax", "bias", "null", "shared", "drop_position", "expert_choice", "jitter"]
)
def test_torch_compiles_the_whole_layer_into_one_graph(name):
    moe = layer(**VARIANTS[name], z_loss=0.1).float()

    def run(x):
        routed = moe(x)
        return routed.delta_TD, moe.aux_loss(routed.choice)

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 9, 10, requires_grad=True)
    seen = []
    for call in (compiled, run):
        delta, loss = call(x)
        leaves = [x, *(p for p in moe.parameters() if p.requires_grad)]
        seen.append((delta, loss, *torch.autograd.grad(delta.square().sum() + loss, leaves)))
    for ours, wanted in zip(*seen, strict=True):
        torch.testing.assert_close(ours, wanted)


def test_a_placement_of_other_experts_is_refused():
    config = MoEConfig(experts=8, top_k=2, hidden=6)
    with pytest.raises(ConfigError, match="placement of 4 experts on 1 ranks: want 8 on 1"):
        MoE(10, config, placement=Placement.contiguous(4, 1))
    with pytest.raises(ConfigError, match=r"want every expert 0\.\.E-1 on some rank"):
        dataclasses.replace(Placement.contiguous(4, 2), experts_of_rank=((0, 1), (1, 3)))
