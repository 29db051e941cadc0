"""Which tokens attend to which: masks and block choices against loops over the definition."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_router.routing.blocks import Blocks
from moe_router_kernels.reference_attention import (
    attend_blocks,
    block_means,
    choose_blocks,
    generate_mask,
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


def bounds(lengths, block, causal):
    """First and last token of each block, and the key blocks low..high-1 that it may choose."""
    blocks = Blocks.of(lengths, block, torch.device("cpu"), causal=causal)
    return (blocks.first_N, blocks.last_N), (blocks.own_N, blocks.low_N, blocks.high_N)


@few
@given(sequences, st.integers(1, 4), st.integers(1, 5), st.integers(0, 2), st.booleans())
def test_own_block_and_the_window_then_the_best(lengths, block, k, window, causal):
    (first, last), seen = bounds(lengths, block, causal)
    home = [b for b, n in enumerate(lengths) for _ in range(-(-n // block))]
    N, k = len(home), max(k, 2 * window + 1)
    assert first.tolist() == [0, *last.tolist()[:-1]][:N] and sum(last - first) == sum(lengths)
    score = torch.randn(N, 2, N, generator=torch.Generator().manual_seed(N))
    target = choose_blocks(score, *seen, k, window)
    assert target.shape == (N, 2, k) and target.dtype == torch.int32
    for n in range(N):
        open_to = [m for m in range(N) if home[m] == home[n] and (m <= n or not causal)]
        for j in range(2):
            always = [m for m in open_to if abs(m - n) <= window]
            rest = sorted(set(open_to) - set(always), key=lambda m: -float(score[n, j, m]))
            wanted = sorted(always + rest[: k - len(always)])
            assert target[n, j].tolist() == wanted + [-1] * (k - len(wanted))


def test_of_equal_scores_the_lower_block_and_nan_last():
    score = torch.tensor([0.5, float("nan"), -0.0, 0.0, 0.5, 0.0]).expand(6, 1, 6)
    _, seen = bounds([6], 1, True)
    assert choose_blocks(score, *seen, 3)[5, 0].tolist() == [0, 4, 5]
    assert choose_blocks(score, *seen, 4)[5, 0].tolist() == [0, 2, 4, 5]
    assert choose_blocks(score, *seen, 5)[5, 0].tolist() == [0, 2, 3, 4, 5]


def test_means_are_of_the_tokens_of_a_block_and_of_the_heads_that_share_keys():
    torch.manual_seed(0)
    x = torch.randn(7, 4, 3)
    means = block_means(x, *bounds([5, 0, 2], 2, True)[0], 2)
    for n, tokens in enumerate(([0, 1], [2, 3], [4], [5, 6])):
        torch.testing.assert_close(means[n, 1], x[tokens, 2:].mean((0, 1)))


def test_all_blocks_are_dense_causal_attention():
    torch.manual_seed(0)
    q, k, v = torch.randn(13, 4, 8), torch.randn(13, 2, 8), torch.randn(13, 2, 8)
    (first, last), seen = bounds([13], 4, True)
    target = choose_blocks(torch.randn(4, 2, 4), *seen, 4)
    wanted = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(0, 1) for x in (q, k, v)), is_causal=True, enable_gqa=True
    )
    ours = attend_blocks(q, k, v, first, last, target)
    torch.testing.assert_close(ours, wanted.transpose(0, 1))
    halves = attend_blocks(q, k, v, first, last, target, torch.full(target.shape, 0.5))
    torch.testing.assert_close(halves, ours / 2)
