"""Merging: who joins whom, by the definition written with loops; means, sizes, un-merge."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_router import Context, Ledger
from moe_router.config import RoutingConfig
from moe_router.errors import ConfigError
from moe_router.layers.merge import Merge, kept_of, kept_of_each, unmerge
from moe_router.models.attend import _more_channels, attend_packed
from moe_router.models.packing import Packing
from moe_router.types import Tokens

D, J, C = 6, 2, 4


def config(**more):
    return RoutingConfig(**{"kind": "merge", "keep": 0.6, "every": 1, "first": 0} | more)


def batch(lengths, seed=0, sizes=False):
    generator = torch.Generator().manual_seed(seed)
    T = sum(lengths)
    x_TD, key_TJC = (
        torch.randn(T, *shape, generator=generator, dtype=torch.float64) for shape in ((D,), (J, C))
    )
    position_T = torch.cat([torch.zeros(0).int(), *(torch.arange(n).int() for n in lengths)])
    size_T = torch.randint(1, 5, (T,), generator=generator).float() if sizes else None
    offsets_B1 = torch.tensor([0, *lengths]).cumsum(0).int()
    return Tokens(x_TD, position_T, offsets_B1, size_T), key_TJC


def who_joins(key_SC, leave):
    """{token: partner} of one sequence: Bolya et al. 2022, section 3, with loops."""
    key_SC, best = key_SC.detach(), {}
    for a in range(2, len(key_SC), 2):
        similar = {
            b: float(F.cosine_similarity(key_SC[a], key_SC[b], dim=0))
            for b in range(1, len(key_SC), 2)
        }
        best[a] = max(similar.items(), key=lambda pair: pair[1])
    strongest = sorted(best, key=lambda a: -best[a][1])[:leave]
    return {a: best[a][0] for a in strongest}


LENGTHS = st.lists(st.integers(0, 13), min_size=0, max_size=5)


@settings(max_examples=15, deadline=None)
@given(lengths=LENGTHS, keep=st.sampled_from([0.5, 0.6, 0.8, 1.0]), sizes=st.booleans())
def test_slots_means_and_sizes_are_those_of_the_definition(lengths, keep, sizes):
    tokens, key_TJC = batch(lengths, sizes=sizes)
    merged = Merge(D, C, config(keep=keep))(tokens, key_TJC, lengths, Context())
    x_MD, size_M = merged.mean(tokens)
    size_T = torch.ones(sum(lengths)) if tokens.size_T is None else tokens.size_T
    slots, start, slot_of = [], 0, {}
    for n in lengths:
        joins = who_joins(key_TJC[start : start + n].mean(1), n - kept_of(n, keep))
        for t in range(n):
            if t not in joins:
                members = sorted([t, *(a for a, b in joins.items() if b == t)])
                slot_of |= {start + member: len(slots) for member in members}
                slots.append([start + member for member in members])
        start += n
    assert len(slots) == len(x_MD) == sum(merged.kept.lengths)
    assert merged.slot_T.tolist() == [slot_of[t] for t in range(sum(lengths))]
    for m, members in enumerate(slots):
        total = size_T[members].sum()
        mean_D = (size_T[members, None] * tokens.x_TD[members]).sum(0) / total
        torch.testing.assert_close(x_MD[m], mean_D)
        assert size_M[m] == total
        place = merged.kept.plan.src_R[m]
        assert place in members
        assert all(tokens.position_T[t] % 2 == 0 for t in members if t != place)
    assert merged.plan.out == "group" and size_M.sum() == size_T.sum()
    back_TD = unmerge(x_MD, merged.slot_T)
    for t in range(sum(lengths)):
        assert torch.equal(back_TD[t], x_MD[slot_of[t]])


@pytest.mark.parametrize("n", range(12))
def test_more_than_can_leave_is_a_half_of_all_but_the_first(n):
    """keep 0.5 of an even number would have the first leave, or nobody to join."""
    assert kept_of(n, 0.5) == n - max(n - 1, 0) // 2
    assert kept_of(n, 1.0) == n
    assert kept_of(n, 0.8) == max(math.ceil(n * 8 / 10), n - max(n - 1, 0) // 2)
    bounds = torch.tensor([0, n, 2 * n], dtype=torch.int32)
    for keep in (0.5, 0.6, 0.75, 1.0):
        assert kept_of_each(bounds, keep).tolist() == [kept_of(n, keep)] * 2
    tokens, key_TJC = batch([n])
    merged = Merge(D, C, config(keep=0.5))(tokens, key_TJC, [n], Context())
    assert merged.kept.lengths == (kept_of(n, 0.5),)
    if n:
        assert merged.slot_T[0] == 0 and merged.kept.plan.src_R[0] == 0


def test_the_first_token_of_each_sequence_is_alone_whatever_its_key():
    tokens, key_TJC = batch([7, 8])
    key_TJC[:] = 1.0  # all alike
    merged = Merge(D, C, config(keep=0.5))(tokens, key_TJC, [7, 8], Context())
    counts = merged.slot_T.bincount()
    assert merged.kept.lengths == (4, 5)
    assert counts[merged.slot_T[0]] == counts[merged.slot_T[7]] == 1
    assert counts.tolist() == [1, 4, 1, 1, 1, 4, 1, 1, 1]  # the first of the best wins a tie


def test_gradients_of_mean_and_unmerge_are_exact():
    tokens, key_TJC = batch([5, 1, 6], sizes=True)
    merged = Merge(D, C, config())(tokens, key_TJC, [5, 1, 6], Context())

    def there_and_back(x_TD):
        x_MD, _ = merged.mean(Tokens(x_TD, *rest))
        return unmerge(x_MD, merged.slot_T)

    rest = (tokens.position_T, tokens.offsets_B1, tokens.size_T)
    torch.autograd.gradcheck(there_and_back, (tokens.x_TD.requires_grad_(),))
    x_MD, _ = merged.mean(tokens)
    assert len(x_MD) < 12  # something merged


@settings(max_examples=10, deadline=None)
@given(lengths=LENGTHS, seed=st.integers(0, 3))
def test_a_sequence_merges_as_if_it_were_alone(lengths, seed):
    tokens, key_TJC = batch(lengths, seed, sizes=True)
    layer = Merge(D, C, config())
    x_MD, size_M = layer(tokens, key_TJC, lengths, Context()).mean(tokens)
    start, done = 0, 0
    for n in lengths:
        part = slice(start, start + n)
        alone = Tokens(
            tokens.x_TD[part], tokens.position_T[part], torch.tensor([0, n]).int(),
            tokens.size_T[part],
        )  # fmt: skip
        x_SD, size_S = layer(alone, key_TJC[part], [n], Context()).mean(alone)
        torch.testing.assert_close(x_MD[done : done + len(x_SD)], x_SD)
        assert torch.equal(size_M[done : done + len(x_SD)], size_S)
        start, done = start + n, done + len(x_SD)


def test_controls_see_position_alone_or_a_random_projection():
    tokens, key_TJC = batch([12])
    other = torch.randn(12, J, C, dtype=torch.float64)
    for more in ({"router": "position", "router_hidden": 4}, {"frozen": True}):
        layer = Merge(D, C, config(**more)).double()
        assert all(not p.requires_grad for p in layer.parameters())
        ours, theirs = (layer(tokens, key, [12], Context()) for key in (key_TJC, other))
        assert torch.equal(ours.slot_T, theirs.slot_T)  # keys do not matter
        content = Tokens(tokens.x_TD.flip(0), tokens.position_T, tokens.offsets_B1)
        same = torch.equal(layer(content, key_TJC, [12], Context()).slot_T, ours.slot_T)
        assert same == ("router" in more)


def test_who_merges_is_decided_in_fp32_whatever_flows():
    tokens, key_TJC = batch([40, 30])
    key_TJC = 1 + 1e-3 * key_TJC.float()  # alike up to what bf16 keeps
    x = Tokens(tokens.x_TD.float(), tokens.position_T, tokens.offsets_B1)
    wanted = Merge(D, C, config())(x, key_TJC, [40, 30], Context())
    with torch.autocast("cpu", torch.bfloat16):
        merged = Merge(D, C, config())(x, key_TJC, [40, 30], Context())
        assert merged.mean(x)[0].dtype == torch.float32
    assert torch.equal(merged.slot_T, wanted.slot_T)


def test_it_counts_the_products_of_the_match():
    ledger, (tokens, key_TJC) = Ledger(), batch([5, 1, 0, 6])
    Merge(D, C, config())(tokens, key_TJC, [5, 1, 0, 6], Context(ledger=ledger))
    match = 2 * C * (3 * 2 + 0 + 0 + 3 * 3)
    assert ledger.by_op() == {"router": (match, 0)}
    ledger.reset()
    control = Merge(D, C, config(frozen=True)).double()
    control(tokens, key_TJC, [5, 1, 0, 6], Context(ledger=ledger))
    assert ledger.by_op() == {"router": (match + 2 * 12 * D * C, 0)}


@pytest.mark.parametrize(
    "more, message",
    [
        ({"keep": 0.4}, r"^model\.routing\.keep=0\.4: want 0\.5 <= keep <= 1"),
        ({"router": "mlp"}, r"^model\.routing\.router=mlp: want linear .* or position"),
    ],
)
def test_what_cannot_be_is_refused(more, message):
    with pytest.raises(ConfigError, match=message):
        config(**more)


def by_channels(q, k, v, size_T, packing):
    """As on a kernel that takes no mask."""
    return attend_packed(*_more_channels(q, k, v, size_T), packing)[..., : q.size(-1)]


def by_mask(q, k, v, size_T, packing):
    return attend_packed(q, k, v, packing, size_T)


@pytest.mark.parametrize("attend", [by_channels, by_mask])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_token_of_size_s_is_seen_as_s_equal_ones(dtype, attend):
    generator = torch.Generator().manual_seed(0)
    lengths, heads, keys = [4, 1, 6], 4, 2
    T = sum(lengths)
    size_T = torch.tensor([1, 3, 2, 1, 5, 1, 1, 4, 2, 1, 3])
    q, k, v = (
        torch.randn(T, n, 8, generator=generator, dtype=dtype, requires_grad=True)
        for n in (heads, keys, keys)
    )
    packing = Packing(torch.tensor([0, 4, 5, 11]), torch.device("cpu"), causal=False)
    ours = attend(q, k, v, size_T.float(), packing)
    parts = []
    for a, b in ((0, 4), (4, 5), (5, 11)):
        copies = torch.arange(a, b).repeat_interleave(size_T[a:b])
        n = len(copies)
        whole = Packing(torch.tensor([0, n]), torch.device("cpu"), causal=False)
        for t in range(a, b):  # one query among copies of the keys
            query = q[t : t + 1].expand(n, -1, -1)
            parts.append(attend_packed(query, k[copies], v[copies], whole)[:1])
    wanted = torch.cat(parts)
    tolerance = {"rtol": 1e-9, "atol": 1e-9} if dtype is torch.float64 else {}
    if dtype is torch.float64:  # log(size) is fp32
        tolerance = {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(ours, wanted, **tolerance)
    probe = torch.randn(ours.shape, generator=generator, dtype=dtype)
    grads, theirs = (torch.autograd.grad((y * probe).sum(), (q, k, v)) for y in (ours, wanted))
    for a, b in zip(grads, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
