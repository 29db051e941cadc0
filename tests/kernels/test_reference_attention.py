"""Which tokens attend to which: masks and block choices against loops over the definition."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_router_kernels.reference_attention import (
    block_mask,
    choose_blocks,
    generate_mask,
    masked_attention,
)

few = settings(max_examples=25, deadline=None)
sequences = st.lists(st.integers(0, 9), min_size=1, max_size=4)


@few
@given(sequences, st.integers(1, 4), st.integers(0, 3), st.integers(0, 2), st.integers(0, 99))
def test_the_mask_is_its_definition(lengths, clusters, window, first, seed):
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    T = int(offsets[-1])
    scores = torch.randn(T, clusters, generator=torch.Generator().manual_seed(seed))
    mask = generate_mask(offsets, scores, window, first)
    home = [b for b, n in enumerate(lengths) for _ in range(n)]
    cluster = scores.argmax(-1)
    for q in range(T):
        for k in range(T):
            position = k - int(offsets[home[k]])
            near = q - k <= window or position < first or cluster[q] == cluster[k]
            assert mask[q, k] == (home[q] == home[k] and k <= q and near)
    assert mask.diagonal().all()


@few
@given(st.integers(1, 21), st.integers(1, 5), st.integers(1, 4), st.integers(0, 99))
def test_own_block_first_then_the_best_earlier_ones(S, block, k, seed):
    generator = torch.Generator().manual_seed(seed)
    q, key = torch.randn(S, 4, 8, generator=generator), torch.randn(S, 2, 8, generator=generator)
    target = choose_blocks(q, key, block, k)
    blocks = -(-S // block)
    assert target.shape == (blocks, 2, min(k, blocks))
    for n in range(blocks):
        for j in range(2):
            row = target[n, j].tolist()
            chosen = [i for i in row if i >= 0]
            assert row[0] == n and len(set(chosen)) == len(chosen) == min(k, n + 1)
            assert all(i <= n for i in chosen)
            query = q[n * block : (n + 1) * block, 2 * j : 2 * j + 2].mean((0, 1))
            means = [key[i * block : (i + 1) * block, j].mean(0) @ query for i in range(n)]
            best = sorted(range(n), key=lambda i: -float(means[i]))[: k - 1]
            assert set(chosen[1:]) == set(best)


def test_all_blocks_are_dense_causal_attention():
    torch.manual_seed(0)
    q, k, v = torch.randn(13, 4, 8), torch.randn(13, 2, 8), torch.randn(13, 2, 8)
    mask = block_mask(choose_blocks(q, k, 4, 4), 13, 4)
    assert torch.equal(mask, torch.ones(13, 13, dtype=torch.bool).tril().expand(2, 13, 13))
    wanted = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(0, 1) for x in (q, k, v)), is_causal=True, enable_gqa=True
    )
    ours = masked_attention(q, k, v, mask)
    torch.testing.assert_close(ours, wanted.transpose(0, 1))


def test_a_later_token_changes_no_earlier_block_choice():
    torch.manual_seed(0)
    q, k = torch.randn(16, 2, 8), torch.randn(16, 2, 8)
    before = choose_blocks(q, k, 4, 2)
    q[12:], k[12:] = torch.randn(4, 2, 8), torch.randn(4, 2, 8)
    assert torch.equal(choose_blocks(q, k, 4, 2)[:3], before[:3])
