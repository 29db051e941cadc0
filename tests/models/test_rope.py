import pytest
import torch

from moe_router.models.rope import rotate, turn_at


def turned(x_THC, positions, theta=100.0):
    return rotate(x_THC, turn_at(torch.tensor(positions, dtype=torch.int32), 8, theta))


def test_position_0_turns_nothing_and_no_position_changes_a_length():
    x_THC = torch.randn(3, 2, 8)
    out = turned(x_THC, [0, 5, 1_000_000])
    assert torch.equal(out[0], x_THC[0])
    torch.testing.assert_close(out.norm(dim=-1), x_THC.norm(dim=-1))
    assert not torch.allclose(out[1], x_THC[1], atol=0.1)


@pytest.mark.parametrize("shift", [1, 1000, 1_000_000])
def test_a_product_depends_on_the_distance_alone(shift):
    q_1HC, k_1HC = torch.randn(1, 2, 8), torch.randn(1, 2, 8)
    near = (turned(q_1HC, [7]) * turned(k_1HC, [3])).sum(-1)
    far = (turned(q_1HC, [7 + shift]) * turned(k_1HC, [3 + shift])).sum(-1)
    torch.testing.assert_close(near, far, rtol=1e-5, atol=1e-5)


def test_half_precision_is_turned_in_fp32():
    assert turned(torch.randn(1, 2, 8, dtype=torch.bfloat16), [3]).dtype == torch.float32
