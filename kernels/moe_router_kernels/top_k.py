"""Triton: the best groups of a token, by keys that a warp compares at once.

A float becomes an int32 of the same order: the maximum of integers over a warp is one instruction,
that of floats with their index ten shuffles. Specification: `reference.decide`.
"""

import triton
import triton.language as tl

TAKEN: tl.constexpr = tl.constexpr(-(2**31))  # below every key


@triton.jit
def fours(tile):  # type: ignore[no-untyped-def]
    """(T, G) as four of (T, G / 4): neighbours in G, which one thread holds, part."""
    even, odd = tl.split(tile.reshape(tile.shape[0], tile.shape[1] // 4, 2, 2))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def key_of(ranked):  # type: ignore[no-untyped-def]
    """int32 in the order of the floats: both zeros have one key, NaN has one below all numbers."""
    bits = tl.where(ranked == 0.0, 0.0, ranked).to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(ranked == ranked, bits, -(2**31) + 1)


@triton.jit
def value_of(key):  # type: ignore[no-untyped-def]
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def _exchanged(key, group, other_key, other_group, swap):  # type: ignore[no-untyped-def]
    """Both pairs, exchanged where swap says so."""
    return (
        tl.where(swap, other_key, key),
        tl.where(swap, other_group, group),
        tl.where(swap, key, other_key),
        tl.where(swap, group, other_group),
    )


@triton.jit
def best_groups(  # type: ignore[no-untyped-def]
    key, BLOCK_T: tl.constexpr, G_PAD: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr
):
    """The groups of the K highest keys and those keys, best first; ties go to the lower group.

    Four neighbours, which one thread holds, are sorted first. Then a choice is two reductions over
    the heads of the fours, of integers, so that each is one instruction of a warp, and whoever
    lost its head moves up.
    """
    slot, four = tl.arange(0, K_PAD)[None, :], tl.arange(0, G_PAD // 4)[None, :] * 4
    key0, key1, key2, key3 = fours(key)
    zero = tl.zeros_like(key0)
    at0, at1, at2, at3 = four + zero, four + 1 + zero, four + 2 + zero, four + 3 + zero
    key0, at0, key1, at1 = _exchanged(key0, at0, key1, at1, key1 > key0)
    key2, at2, key3, at3 = _exchanged(key2, at2, key3, at3, key3 > key2)
    key0, at0, key2, at2 = _exchanged(key0, at0, key2, at2, key2 > key0)
    key1, at1, key3, at3 = _exchanged(key1, at1, key3, at3, key3 > key1)
    # only here may the higher group stand first
    swap = (key2 > key1) | ((key2 == key1) & (at2 < at1))
    key1, at1, key2, at2 = _exchanged(key1, at1, key2, at2, swap)
    raw = tl.zeros((BLOCK_T, K_PAD), tl.int32)
    won = tl.zeros((BLOCK_T, K_PAD), tl.int32)
    for k in tl.static_range(K):
        first = tl.max(key0, 1)[:, None]
        best = tl.min(tl.where(key0 == first, at0, G_PAD), 1)[:, None]
        raw = tl.where(slot == k, best, raw)
        won = tl.where(slot == k, first, won)
        mine = at0 == best
        key0, at0 = tl.where(mine, key1, key0), tl.where(mine, at1, at0)
        key1, at1 = tl.where(mine, key2, key1), tl.where(mine, at2, at1)
        key2, at2 = tl.where(mine, key3, key2), tl.where(mine, at3, at2)
        key3 = tl.where(mine, TAKEN, key3)
    return raw, won


@triton.jit
def _two_best(first, second, other_first, other_second):  # type: ignore[no-untyped-def]
    """The two best of two pairs, each best first."""
    rest = tl.maximum(second, other_second)
    return tl.maximum(first, other_first), tl.maximum(tl.minimum(first, other_first), rest)


@triton.jit
def limit_groups(  # type: ignore[no-untyped-def]
    ranked,
    BLOCK_T: tl.constexpr,
    G_PAD: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
):
    """-inf outside each token's best groups; a group is worth its two best experts."""
    size: tl.constexpr = G_PAD // GROUPS
    grouped = ranked.reshape(BLOCK_T, GROUPS, size)
    lowest = tl.full((BLOCK_T, GROUPS, size), float("-inf"), tl.float32)
    first, second = tl.reduce((grouped, lowest), 2, _two_best)
    worth = first + second
    one, other = tl.arange(0, GROUPS)[:, None], tl.arange(0, GROUPS)[None, :]
    mine, theirs = worth[:, :, None], worth[:, None, :]
    ahead = (theirs > mine) | ((theirs == mine) & (other < one)[None, :, :])
    kept = (tl.sum(ahead.to(tl.int32), 2) < TOP_GROUPS)[:, :, None]
    return tl.where(kept, grouped, float("-inf")).reshape(BLOCK_T, G_PAD)
