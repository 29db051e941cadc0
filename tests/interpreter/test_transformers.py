"""The experts of transformers' models through the fused kernels, on a GPU or interpreted."""

import os

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("transformers")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1", allow_module_level=True)
import moe_router  # noqa: E402
from moe_router.integrations import transformers as backend  # noqa: E402
from moe_router_kernels import fused_experts, runs_expert_mlp  # noqa: E402
from tests.integrations import hf_experts  # noqa: E402

DEVICE = "cpu" if INTERPRETED else "cuda"


def test_a_plain_module_of_experts_is_fused(monkeypatch):
    moe_router.register_transformers()
    launched = []
    forward = fused_experts.forward
    monkeypatch.setattr(
        fused_experts, "forward", lambda *args: launched.append(1) or forward(*args)
    )
    # fp32, which `auto` leaves to torch
    monkeypatch.setattr(backend, "runs_expert_mlp", lambda _, *of: runs_expert_mlp("triton", *of))
    (kind, *_) = hf_experts.classes("mixtral.modeling_mixtral")
    experts = hf_experts.made(kind, device=DEVICE)
    x_TD, ids_TK, weight_TK = hf_experts.problem(experts, device=DEVICE)
    weight_TK.data[3, 1] = 0.0
    wanted = hf_experts.run(experts, "eager", x_TD, ids_TK, weight_TK)
    ids_TK[3, 1] = experts.num_experts  # of another rank, which eager of 5.17 does not know
    experts._is_expert_parallel = True
    ours = hf_experts.run(experts, "moe_router", x_TD, ids_TK, weight_TK)
    assert launched == [1]
    wanted[2][3, 1] = 0.0
    for one, other in zip(ours, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
