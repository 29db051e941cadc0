"""Routing in depth on a GPU: the CPU's numbers in fp32, the same bits every time in bf16."""

import pytest
import torch

from moe_router import Context, Ledger
from moe_router.config import RoutingConfig
from tests.cuda_graphs import captured
from tests.models.helpers import packed, small_model
from tests.models.test_depth import LENGTHS, VARIANTS, depth_model

pytestmark = pytest.mark.gpu


def run(name, device, dtype=torch.float32, training=True):
    # heads of 8 channels, so that bf16 takes the packed kernel
    model = depth_model(name, dim=32, std=4.0, vocab=200)
    model.train(training).to(device)
    ids_T, position_T, offsets_B1 = packed([60, 1, 33, 128], vocab=200)
    ledger = Ledger()
    with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
        output = model(
            ids_T.to(device), position_T.to(device), offsets_B1, context=Context(ledger=ledger)
        )
    (output.logits_TV.square().mean() + model.aux_loss(output)).backward()
    grads = [torch.zeros(()) if p.grad is None else p.grad.cpu() for p in model.parameters()]
    return output.logits_TV.detach().cpu(), grads, ledger.by_op()


@pytest.fixture(autouse=True)
def _exact_and_repeatable(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", VARIANTS)
def test_equals_the_cpu(name, training):
    logits, grads, flops = run(name, "cuda", training=training)
    wanted, wanted_grads, wanted_flops = run(name, "cpu", training=training)
    assert flops == wanted_flops
    torch.testing.assert_close(logits, wanted, rtol=1e-3, atol=1e-3)
    for one, other in zip(grads, wanted_grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("name", VARIANTS)
def test_repeats_bit_by_bit_in_bf16(name):
    first, second = run(name, "cuda", torch.bfloat16), run(name, "cuda", torch.bfloat16)
    assert torch.equal(first[0], second[0]) and first[2] == second[2]
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


def test_training_a_skip_never_waits_for_the_device():
    """The number of kept tokens is known to the host: keep times the lengths."""
    routing = RoutingConfig(kind="skip", every=1, first=0)
    model = small_model(None, routing=routing, dim=32).cuda().bfloat16()
    ids_T, position_T, offsets_B1 = packed(LENGTHS)
    batch = ids_T.cuda(), position_T.cuda(), offsets_B1

    def step():
        output = model(*batch)
        (output.logits_TV.sum() + model.aux_loss(output)).backward()

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert model.embed.weight.grad.isfinite().all()


@pytest.mark.parametrize("more", [{}, {"predictor": "mlp", "router": "mlp"}])
def test_a_training_step_of_a_skip_is_one_cuda_graph(more):
    """Its shapes are keep times the lengths, and nothing is copied from the host."""
    routing = RoutingConfig(kind="skip", every=1, first=0, keep=0.3, **more)
    model = small_model(None, routing=routing, dim=32, vocab=200).cuda().bfloat16()
    drawn = [packed([60, 1, 33, 128], seed, vocab=200) for seed in range(3)]
    ids_T, position_T = (x.cuda() for x in drawn[0][:2])
    packing = model.packing(drawn[0][2], ids_T.device)
    weights = [p for p in model.parameters() if p.requires_grad]

    def step():
        output = model(ids_T, position_T, packing)
        loss = output.logits_TV.square().mean() + model.aux_loss(output)
        grads = torch.autograd.grad(loss, weights)
        return torch.stack([loss, *(g.float().square().sum() for g in grads)])

    replay = captured(step)
    for other_T, *_ in drawn:
        ids_T.copy_(other_T)
        assert torch.equal(replay(), step())
