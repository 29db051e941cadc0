import pytest
import torch

from moe_router.models.norm import RMSNorm


def test_the_mean_square_becomes_1_times_the_weight():
    norm = RMSNorm(6, eps=0.0)
    with torch.no_grad():
        norm.weight.fill_(3.0)
    y = norm(torch.randn(4, 6) * 100)
    torch.testing.assert_close(y.square().mean(-1), torch.full((4,), 9.0))


def test_half_precision_is_normalised_in_fp32():
    x = torch.full((1, 8), 3e4, dtype=torch.float16)  # its square is infinite in fp16
    y = RMSNorm(8, eps=1e-5)(x)
    assert y.dtype == torch.float16
    torch.testing.assert_close(y, torch.ones_like(x))


def test_autocast_gives_its_dtype():
    with torch.autocast("cpu", torch.bfloat16):
        assert RMSNorm(8, eps=1e-5)(torch.randn(2, 8)).dtype == torch.bfloat16


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bit_on_a_gpu_one_launch_computes_in_fp32(dtype):
    torch.manual_seed(0)
    norm = RMSNorm(2048, 1e-6).to("cuda", dtype)
    torch.nn.init.normal_(norm.weight)
    x = 100 * torch.randn(33, 2048, device="cuda").to(dtype)
    wanted = norm(x)  # with gradients: cast by cast
    with torch.no_grad():
        got = norm(x)
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), wanted.float(), rtol=8e-3, atol=0)
    assert (got == wanted).float().mean() > 0.99
