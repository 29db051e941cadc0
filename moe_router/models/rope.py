"""Rotary position embedding: two halves of a head are the two coordinates that turn.

Source: Su et al. 2021, arXiv:2104.09864. There is no table of positions, so no longest sequence.
In an image half of the channels turn by the row, half by the column.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from moe_router_kernels import reference_pages


class Turn(NamedTuple):
    """How far each token turns: fp32, (T, 1, C) for C channels of a head."""

    cos_T1C: Tensor
    sin_T1C: Tensor


def turn_at(position_T: Tensor, channels: int, theta: float) -> Turn:
    """Cosines and signed sines for each position; computed once, used by every layer.

    Args:
        position_T: (T,) integers.
        channels: of one head, even.
        theta: the slowest pair turns by about 1 / theta a token.
    """
    return _turn(_angles(position_T, channels, theta))


def turn_in_grid(position_T: Tensor, width: int, channels: int, theta: float) -> Turn:
    """The same in two dimensions.

    Args:
        position_T: (T,) integers that count places row by row.
        width: places in a row.
        channels: of one head, a multiple of 4.
        theta: the slowest pair turns by about 1 / theta a place.
    """
    row_T, column_T = position_T // width, position_T % width
    return _turn(torch.cat([_angles(at_T, channels // 2, theta) for at_T in (row_T, column_T)], -1))


def _angles(position_T: Tensor, channels: int, theta: float) -> Tensor:
    """(T, channels / 2) fp64: an fp32 angle is off by 0.06 at position 1M."""
    pair = torch.arange(0, channels, 2, device=position_T.device, dtype=torch.float64)
    return position_T[:, None].double() * theta ** (-pair / channels)


def _turn(angle_TC: Tensor) -> Turn:
    cos_TC, sin_TC = angle_TC.cos().float(), angle_TC.sin().float()
    return Turn(torch.cat([cos_TC, cos_TC], -1)[:, None], torch.cat([-sin_TC, sin_TC], -1)[:, None])


def rotate(x_THC: Tensor, turn: Turn) -> Tensor:
    """Turn queries or keys, in fp32 at least; returns that dtype."""
    return reference_pages.turn(x_THC, *turn)
