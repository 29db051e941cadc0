"""A shuffle of any length that takes no memory: row n of an epoch is a formula, not a table.

Source: Luby and Rackoff 1988 (Feistel rounds); Black and Rogaway 2002, "Ciphers with arbitrary
finite domains" (rounds over Z_a x Z_b, cycle walking); Steele, Lea and Flood 2014 (the mixer of
SplitMix64).
"""

import math

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 6
_A = np.uint64(0xBF58476D1CE4E5B9)
_B = np.uint64(0x94D049BB133111EB)
_30, _27, _31 = np.uint64(30), np.uint64(27), np.uint64(31)


def permute(index_N: NDArray[np.int64], length: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
    """Where a shuffle of 0..length-1, named by (seed, epoch), puts each index.

    Args:
        index_N: int64, each in 0..length-1.
        length: of the shuffled range, at least 1.
        seed, epoch: the key; other values give another shuffle.

    Returns:
        int64, shape of `index_N`; over the whole range, every number exactly once.
    """
    low = math.isqrt(length - 1) + 1  # low * high >= length, by less than low
    high = -(-length // low)
    entropy = [seed % 2**64, epoch]
    keys = np.random.SeedSequence(entropy).generate_state(_ROUNDS, np.uint64).astype(np.uint64)
    out = _rounds(index_N.astype(np.uint64), low, high, keys)
    # A bijection of a slightly larger range: walk on from each value outside until it is inside.
    while (outside := out >= np.uint64(length)).any():
        out[outside] = _rounds(out[outside], low, high, keys)
    return out.astype(np.int64)


def _rounds(
    x_N: NDArray[np.uint64], low: int, high: int, keys: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    """A bijection of 0..low*high-1: each half in turn is moved by a hash of the other."""
    sides = np.uint64(low), np.uint64(high)
    right, left = np.divmod(x_N, sides[0])  # left < low, right < high
    for i in range(0, _ROUNDS, 2):
        left = (left + _mix(right, keys[i]) % sides[0]) % sides[0]
        right = (right + _mix(left, keys[i + 1]) % sides[1]) % sides[1]
    joined: NDArray[np.uint64] = right * sides[0] + left
    return joined


def _mix(x_N: NDArray[np.uint64], key: np.uint64) -> NDArray[np.uint64]:
    x_N = x_N + key  # uint64 arrays wrap around silently, as the mixer wants
    x_N = (x_N ^ (x_N >> _30)) * _A
    x_N = (x_N ^ (x_N >> _27)) * _B
    return x_N ^ (x_N >> _31)
