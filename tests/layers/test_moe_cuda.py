"""The MoE layer on a GPU: equal to the CPU in fp32, close in bf16, the same bits every time."""

import pytest
import torch

from moe_router import MoE, MoEConfig
from tests.cuda_graphs import captured

pytestmark = pytest.mark.gpu

VARIANTS = {
    "softmax": {},
    "deepseek": {
        "score": "sigmoid",
        "bias_rate": 0.1,
        "expert_groups": 4,
        "top_groups": 2,
        "shared_hidden": 32,
        "sequence_balance_loss": 0.1,
    },
    "capacity": {"capacity_factor": 0.8},
    "null": {"null_experts": 3, "jitter": 0.2, "z_loss": 0.1},
    "expert_choice": {"policy": "expert_choice"},
}


def run(name, device, dtype=torch.float32):
    torch.manual_seed(0)
    moe = MoE(64, MoEConfig(experts=8, top_k=2, hidden=96, **VARIANTS[name])).to(device)
    x = torch.randn(4, 50, 64).to(device).requires_grad_()
    grad = torch.randn(4, 50, 64).to(device)
    with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype != torch.float32):
        routed = moe(x)
    ((routed.delta_TD * grad).sum() + moe.aux_loss(routed.choice)).backward()
    grads = [x.grad, *(p.grad for p in moe.parameters())]
    return [t.detach().cpu() for t in (routed.delta_TD, *grads)], routed.choice.target_TK.cpu()


@pytest.fixture(autouse=True)
def _exact_fp32():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("name", VARIANTS)
def test_equals_the_cpu(name):
    ours, target = run(name, "cuda")
    wanted, wanted_target = run(name, "cpu")
    assert torch.equal(target, wanted_target)
    for one, other in zip(ours, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", VARIANTS)
def test_bf16_is_close(name):
    ours, target = run(name, "cuda", torch.bfloat16)
    wanted, wanted_target = run(name, "cpu")
    assert torch.equal(target, wanted_target)
    for one, other in zip(ours, wanted, strict=True):
        error = (one.float() - other).norm() / other.norm().clamp(min=1e-6)
        assert error < 2e-2


@pytest.mark.parametrize("name", VARIANTS)
def test_repeats_bit_by_bit(name):
    for dtype in (torch.float32, torch.bfloat16):
        first, second = run(name, "cuda", dtype)[0], run(name, "cuda", dtype)[0]
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_router_never_waits_for_the_device():
    """No host synchronisation from scores to combine on the local path, in bf16: torch's fp32
    grouped_mm loops over the groups on the host."""
    torch.manual_seed(0)
    moe = MoE(64, MoEConfig(experts=8, top_k=2, hidden=96)).cuda().bfloat16()
    x = torch.randn(4, 50, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    moe(x).delta_TD.sum().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        routed = moe(x)
        (routed.delta_TD.sum() + moe.aux_loss(routed.choice)).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert routed.delta_TD.isfinite().all()


@pytest.mark.parametrize("tokens", [1, 17, 256])
@pytest.mark.parametrize("name", ["softmax", "deepseek", "null"])
def test_the_whole_layer_is_captured_in_a_cuda_graph(name, tokens):
    torch.manual_seed(0)
    moe = MoE(64, MoEConfig(experts=8, top_k=2, hidden=96, **VARIANTS[name])).cuda().bfloat16()
    moe.eval().requires_grad_(False)
    x = torch.randn(1, tokens, 64, device="cuda", dtype=torch.bfloat16)
    replay = captured(lambda: moe(x).delta_TD)
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        assert torch.equal(replay(), moe(x).delta_TD)


@pytest.mark.parametrize("name", ["softmax", "deepseek"])
def test_forward_and_backward_are_captured_in_a_cuda_graph(name):
    torch.manual_seed(0)
    moe = MoE(64, MoEConfig(experts=8, top_k=2, hidden=96, **VARIANTS[name])).cuda().bfloat16()
    x = torch.randn(1, 300, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    leaves = [x, *(p for p in moe.parameters() if p.requires_grad)]

    def step():
        routed = moe(x)
        loss = routed.delta_TD.float().square().sum() + moe.aux_loss(routed.choice)
        return torch.stack([g.float().sum() for g in torch.autograd.grad(loss, leaves)])

    replay = captured(step)
    for _ in range(2):
        x.data.copy_(torch.randn_like(x))
        assert torch.equal(replay(), step())


def test_torch_compiles_the_layer_on_the_gpu():
    torch.manual_seed(0)
    moe = MoE(64, MoEConfig(experts=8, top_k=2, hidden=96)).cuda().bfloat16()
    compiled = torch.compile(lambda x: moe(x).delta_TD, fullgraph=True)
    x = torch.randn(2, 30, 64, device="cuda", dtype=torch.bfloat16)
    torch.testing.assert_close(compiled(x), moe(x).delta_TD, rtol=2e-2, atol=2e-2)
