"""Linear layers of kept tokens, and of one token, by Triton against the reference, on a GPU or
interpreted."""

import os

import pytest
import torch

from moe_router_kernels import kept_op, linear_op, reference
from tests.interpreter.poison import poisoned

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("moe_router_kernels.kept_rows")
DEVICE = "cpu" if INTERPRETED else "cuda"
# Triton's interpreter computes bf16 wrong
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keep", ["none", "all", "some", "last"])
@pytest.mark.parametrize("tokens, inputs, outputs", [(1, 40, 24), (7, 300, 50), (37, 64, 16)])
def test_kept_tokens_and_nobody_else(tokens, inputs, outputs, keep, dtype):
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, inputs, generator=generator).to(DEVICE, dtype)
    weight = (torch.randn(outputs, inputs, generator=generator) * inputs**-0.5).to(DEVICE, dtype)
    kept = {
        "none": torch.zeros(tokens, dtype=torch.bool),
        "all": torch.ones(tokens, dtype=torch.bool),
        "some": torch.arange(tokens) % 3 == 0,
        "last": torch.arange(tokens) == tokens - 1,
    }[keep].to(DEVICE)
    x = x.masked_fill(~kept[:, None], torch.nan)  # nobody reads it
    with poisoned():
        got = kept_op.linear_of_kept(x, weight, kept, "triton")
    wanted = reference.linear_of_kept(x.double(), weight.double(), kept).to(dtype)
    torch.testing.assert_close(got, wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert bool((got[~kept] == 0).all())


def test_no_tokens():
    x, weight = torch.zeros(0, 8, device=DEVICE), torch.zeros(4, 8, device=DEVICE)
    kept = torch.zeros(0, dtype=torch.bool, device=DEVICE)
    assert kept_op.linear_of_kept(x, weight, kept, "triton").shape == (0, 4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens, dim", [(1, 16), (5, 2500), (3, 1), (0, 8)])
def test_logits_of_tokens_at_any_scale(tokens, dim, dtype):
    generator = torch.Generator().manual_seed(dim)
    x = (30 * torch.randn(tokens, dim, generator=generator)).to(DEVICE, dtype)
    weight = torch.randn(1, dim, generator=generator).to(DEVICE, dtype)
    bias = torch.randn(1, generator=generator).to(DEVICE)
    with poisoned():
        got = kept_op.rms_logit(x, weight, bias, "triton")
    assert got.dtype == torch.float32
    wanted = reference.rms_logit(x.double(), weight.double(), bias.double()).float()
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "inputs, outputs", [(40, [24]), (1030, [9, 1, 30]), (64, [16, 8]), (1, [1])]
)
def test_layers_of_one_token_in_one_launch(inputs, outputs, dtype, wide):
    generator = torch.Generator().manual_seed(inputs)
    x = torch.randn(1, inputs, generator=generator).to(DEVICE, dtype)
    weights = [torch.randn(n, inputs, generator=generator).to(DEVICE, dtype) for n in outputs]
    weights = [w * inputs**-0.5 for w in weights]
    out = torch.float32 if wide else dtype
    with poisoned():
        got = linear_op.linears(x, weights, dtype=out, kernels="triton")
    for y, w in zip(got, weights, strict=True):
        wanted = (x.double() @ w.double().T).to(out)
        tolerance = TOLERANCE[out]
        torch.testing.assert_close(y, wanted, rtol=tolerance, atol=tolerance)


def test_one_token_is_its_own_regime_and_more_are_torchs():
    x, w = torch.randn(2, 8, device=DEVICE), torch.randn(4, 8, device=DEVICE)
    (got,) = linear_op.linears(x, [w], kernels="triton")
    assert torch.equal(got, torch.nn.functional.linear(x, w))
