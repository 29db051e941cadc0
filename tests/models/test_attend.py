import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_router.models import attend_cached
from moe_router.models.attend import attend_packed
from moe_router.models.kv_cache import KVCache
from moe_router.models.packing import NARROW, Packing
from moe_router.models.rope import Turn

CPU = torch.device("cpu")


def packing_of(lengths, device=CPU, *, causal=True):
    return Packing(torch.tensor([0, *lengths]).cumsum(0), device, causal=causal)


def qkv(tokens, heads, kv_heads, channels, **kind):
    shapes = (heads, kv_heads, kv_heads)
    return [torch.randn(tokens, n, channels, **kind).requires_grad_() for n in shapes]


def definition(q_THC, k_TJC, v_TJC, lengths, *, causal=True):
    """Softmax over the past, or over all, a sequence and a head at a time."""
    group = q_THC.size(1) // k_TJC.size(1)
    out, start = [], 0
    for n in lengths:
        here = slice(start, start + n)
        heads = []
        for h in range(q_THC.size(1)):
            q, k, v = q_THC[here, h], k_TJC[here, h // group], v_TJC[here, h // group]
            score = q @ k.T / math.sqrt(q.size(1))
            hidden = causal * torch.ones(n, n, device=q.device).triu(1)
            heads.append(score.masked_fill(hidden.bool(), -torch.inf).softmax(-1) @ v)
        out.append(torch.stack(heads, 1))
        start += n
    return torch.cat(out)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(0, 40) | st.integers(NARROW, NARROW + 3), min_size=1, max_size=6),
    st.sampled_from([(4, 4), (4, 2), (3, 1)]),
    st.booleans(),
)
def test_packed_attention_is_its_definition_forward_and_backward(lengths, heads, causal):
    if not sum(lengths):
        lengths = [*lengths, 1]
    torch.manual_seed(0)
    x = qkv(sum(lengths), *heads, 4, dtype=torch.float64)
    ours = attend_packed(*x, packing_of(lengths, causal=causal))
    wanted = definition(*x, lengths, causal=causal)
    torch.testing.assert_close(ours, wanted)
    weight = torch.randn_like(wanted)
    for got, want in zip(
        torch.autograd.grad((ours * weight).sum(), x),
        torch.autograd.grad((wanted * weight).sum(), x),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


def test_no_tokens_is_no_work():
    x = qkv(0, 4, 2, 4)
    assert attend_packed(*x, packing_of([0, 0])).shape == (0, 4, 4)


STILL = torch.tensor(1.0), torch.tensor(0.0)  # a turn by nothing


def through_a_cache(q, k, v, held, new, page):
    """What comes to the new tokens, the held ones being in a cache; and which tokens are new."""
    (layer,) = KVCache(layers=1, sequences=len(held), page=page).layers
    is_new = torch.cat([torch.arange(a + b) >= a for a, b in zip(held, new, strict=True)])
    for these, lengths in ((~is_new, held), (is_new, new)):
        turn = Turn(*(x.to(q.device).expand(int(these.sum()), 1, q.size(-1)) for x in STILL))
        these = these.to(q.device)
        packing = packing_of(lengths, q.device)
        y, _ = layer.attend(q[these], k[these], v[these], turn, packing)
    return y, is_new.to(q.device)


@pytest.mark.parametrize("page", [1, 4, 64])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
@pytest.mark.parametrize("new", [[2, 4, 0, 1, 1], [1, 1, 1, 1, 1], [0, 0, 3, 0, 0]])
def test_new_tokens_attend_to_the_cache_and_to_themselves(heads, new, page):
    old = [3, 0, 6, 1, 9]
    both = [a + b for a, b in zip(old, new, strict=True)]
    q, k, v = (x.detach() for x in qkv(sum(both), *heads, 4, dtype=torch.float64))
    got, is_new = through_a_cache(q, k, v, old, new, page)
    torch.testing.assert_close(got, definition(q, k, v, both)[is_new])


def test_a_prompt_beside_single_tokens_does_not_widen_their_rows(monkeypatch):
    cells = []
    grid = attend_cached._attend_grid

    def counted(q_THC, k_BJSC, v_BJSC, slot_T, packing):
        cells.append(packing.sequences * packing.longest)
        return grid(q_THC, k_BJSC, v_BJSC, slot_T, packing)

    monkeypatch.setattr(attend_cached, "_attend_grid", counted)
    held, new = [5, 0, 30, 7, 1, 9], [1, 60, 0, 50, 1, 3]
    q, k, v = (x.detach() for x in qkv(sum(held) + sum(new), 4, 2, 8))
    got, is_new = through_a_cache(q, k, v, held, new, 16)
    lengths = [a + b for a, b in zip(held, new, strict=True)]
    torch.testing.assert_close(got, definition(q, k, v, lengths)[is_new])
    assert sorted(cells) == [3, 50]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("new", [[70, 1, 300, 40], [1, 1, 1, 1], [0, 5, 0, 64]])
def test_on_a_gpu_new_tokens_attend_to_the_cache_and_to_themselves(new, dtype):
    held = [30, 500, 0, 64]
    both = [a + b for a, b in zip(held, new, strict=True)]
    q, k, v = (x.detach() for x in qkv(sum(both), 8, 2, 64, dtype=dtype, device="cuda"))
    got, is_new = through_a_cache(q, k, v, held, new, 64)
    wanted = definition(q.double(), k.double(), v.double(), both)[is_new]
    error = (got.double() - wanted).norm() / wanted.norm()
    assert error < (1e-5 if dtype == torch.float32 else 2e-2)


# each way to lay sequences into rows: shared and full, shared with gaps, one a row and shorter
# than it, one a row and as long, one a call
@pytest.mark.parametrize(
    "lengths", [[3, 5, 8, 8], [7, 2, 6, 1], [90, 80, 100], [6, 6], [NARROW + 2, NARROW + 2, 3]]
)
def test_both_ways_a_token_sees_what_the_definition_lets_it_see(lengths):
    x = qkv(sum(lengths), 4, 2, 8, dtype=torch.float64)
    seen = {}
    for causal in (True, False):
        seen[causal] = attend_packed(*x, packing_of(lengths, causal=causal))
        torch.testing.assert_close(seen[causal], definition(*x, lengths, causal=causal))
    last_B = torch.tensor(lengths).cumsum(0) - 1  # it has no later token to see
    torch.testing.assert_close(seen[True][last_B], seen[False][last_B])
    assert (seen[True] - seen[False]).abs().amax((1, 2)).gt(1e-3).sum() >= sum(lengths) / 2


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", [(8, 8), (8, 2)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("channels", [64, 12])
@pytest.mark.parametrize("lengths", [[5, 128, 0, 1, NARROW + 44], [0, 1, 0, 1], [1, 1]])
def test_cuda_kernels_are_the_definition(lengths, heads, dtype, channels, causal):
    x = qkv(sum(lengths), *heads, channels, dtype=dtype, device="cuda")
    ours = attend_packed(*x, packing_of(lengths, torch.device("cuda"), causal=causal))
    exact = [t.detach().double().requires_grad_() for t in x]
    wanted = definition(*exact, lengths, causal=causal)
    grads = torch.autograd.grad(ours.double().square().sum(), x)
    wanted_grads = torch.autograd.grad(wanted.square().sum(), exact)
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    # Whoever sees itself alone asks for nothing: gradients of its query and key are 0, what
    # comes out is rounding, as large as that of the products it was subtracted from.
    size = max(want.abs().max() for want in (wanted, *wanted_grads))
    for got, want in zip((ours, *grads), (wanted, *wanted_grads), strict=True):
        assert (got.double() - want).abs().max() / size < tolerance
