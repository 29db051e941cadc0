import pytest
import torch

from moe_router.models.rope import rotate, turn_at, turn_in_grid


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


def test_in_a_grid_half_of_the_channels_turn_by_row_and_half_by_column():
    """A product depends on the distance in rows and that in columns, and on both."""
    q_1HC, k_1HC = torch.randn(2, 1, 2, 8, generator=torch.Generator().manual_seed(0))

    def product(query, key, width=7):
        places = (torch.tensor([row * width + column]) for row, column in (query, key))
        q, k = (
            rotate(x, turn_in_grid(at, width, 8, 10.0))
            for x, at in zip((q_1HC, k_1HC), places, strict=True)
        )
        return (q * k).sum(-1)

    here = product((2, 3), (1, 1))
    for shift in ((0, 2), (3, 0), (4, 3)):
        query, key = ((r + shift[0], c + shift[1]) for r, c in ((2, 3), (1, 1)))
        torch.testing.assert_close(product(query, key), here, rtol=1e-5, atol=1e-5)
    for other in ((2, 4), (3, 3), (1, 3)):
        assert (product(other, (1, 1)) - here).abs().max() > 1e-2
    # one row is a text whose heads are half as wide
    row = turn_in_grid(torch.arange(5), 5, 8, 10.0)
    text = turn_at(torch.arange(5), 4, 10.0)
    assert torch.equal(row.cos_T1C[..., 2:4], text.cos_T1C[..., :2])
    assert (row.sin_T1C[..., :2] == 0).all()
