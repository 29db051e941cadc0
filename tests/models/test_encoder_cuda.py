"""The classifier on a GPU: the CPU's numbers in fp32, the same bits every time in bf16."""

import pytest
import torch

from moe_router.config import ModelConfig, MoEConfig, RoutingConfig
from moe_router.models import TextClassifier, init_parameters
from tests.models.helpers import packed

pytestmark = pytest.mark.gpu
VOCAB = 200  # long sequences, no id twice
PRUNE = RoutingConfig(kind="prune", keep=0.5, every=1, first=0)
THRESHOLD = {"kind": "prune", "decide": "threshold", "every": 1, "first": 0}
VARIANTS = {
    "dense": {},
    "prune": {"routing": PRUNE},
    "threshold": {"routing": RoutingConfig(**THRESHOLD)},
    "received": {"routing": RoutingConfig(**THRESHOLD, router="attention", threshold=0.99)},
    "merge": {"routing": RoutingConfig(kind="merge", keep=0.6, every=1, first=0)},
    "prune_moe": {"routing": PRUNE, "moe": MoEConfig(experts=4, top_k=2, hidden=16)},
}


def run(name, device, bf16=False):
    config = ModelConfig(
        kind="encoder", layers=3, dim=32, heads=4, kv_heads=2, hidden=48, **VARIANTS[name]
    )
    model = TextClassifier(config, VOCAB, 3)
    init_parameters(model, seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter *= 4.0
    model.to(device)
    ids_T, position_T, offsets_B1 = packed([60, 1, 33, 128], vocab=VOCAB)
    with torch.autocast(device, torch.bfloat16, enabled=bf16):
        output = model(ids_T.to(device), position_T.to(device), offsets_B1)
    (output.logits_BC.square().sum() + model.aux_loss(output)).backward()
    grads = [torch.zeros(()) if p.grad is None else p.grad.cpu() for p in model.parameters()]
    return output.logits_BC.detach().cpu(), grads


@pytest.fixture(autouse=True)
def _exact_and_repeatable(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", VARIANTS)
def test_equals_the_cpu(name):
    (logits, grads), (wanted, wanted_grads) = run(name, "cuda"), run(name, "cpu")
    torch.testing.assert_close(logits, wanted, rtol=1e-3, atol=1e-3)
    for one, other in zip(grads, wanted_grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("name", VARIANTS)
def test_repeats_bit_by_bit_in_bf16_and_is_close(name):
    first, second = run(name, "cuda", bf16=True), run(name, "cuda", bf16=True)
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))
    if name == "dense":  # the flash kernel against the padded one; a router may choose otherwise
        torch.testing.assert_close(first[0], run(name, "cpu")[0], rtol=0.1, atol=0.1)
