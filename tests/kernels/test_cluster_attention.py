"""Attention in clusters, a window and global tokens: the pairs of `generate_mask` alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from moe_router_kernels import near_attention, reference, reference_attention
from moe_router_kernels.cluster_attention import attend_clusters, sort_by_cluster
from moe_router_kernels.near_attention import Band

sequences = st.lists(st.integers(0, 13), min_size=1, max_size=4).filter(any)


def cut(lengths, block):
    """Where blocks begin and end, and where their sequence does."""
    first, last, low, start = [], [], [], 0
    for length in lengths:
        for at in range(0, length, block):
            first.append(start + at)
            last.append(start + min(at + block, length))
            low.append(start)
        start += length
    return (torch.tensor(x, dtype=torch.int32) for x in (first, last, low))


def executed(q, k, v, lengths, cluster_TJ, weight_TJ, clusters, window, first, block):
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    rows = sort_by_cluster(offsets, cluster_TJ, clusters, block, max(lengths), "auto")
    band = (
        Band(*cut(lengths, block), block, window, first, sum(lengths)) if window or first else None
    )
    return attend_clusters(q, k, v, cluster_TJ, weight_TJ, rows, band, block)


@settings(max_examples=15, deadline=None)
@given(
    sequences, st.integers(1, 4), st.integers(0, 5), st.integers(0, 2), st.integers(1, 6),
    st.integers(0, 99),
)  # fmt: skip
def test_executed_pairs_are_the_mask(lengths, clusters, window, first, block, seed):
    """With one channel a key, values show every share: where it is above 0, a pair was seen."""
    generator = torch.Generator().manual_seed(seed)
    T, J = sum(lengths), 2
    scores_TJC = torch.randn(T, J, clusters, generator=generator)
    q, k = (torch.randn(T, heads, T, generator=generator).double() for heads in (4, J))
    v = torch.eye(T).double()[:, None].expand(T, J, T)
    cluster_TJ = torch.stack([reference.top_k(scores_TJC[:, j], 1)[:, 0] for j in range(J)], 1)
    how = (lengths, cluster_TJ, torch.ones(T, J), clusters, window, first, block)
    share_THT = executed(q, k, v, *how)
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    for h in range(4):
        mask_TT = reference_attention.generate_mask(offsets, scores_TJC[:, h // 2], window, first)
        assert torch.equal(share_THT[:, h] > 0, mask_TT)
    torch.testing.assert_close(share_THT.sum(-1), torch.ones(T, 4).double())


def problem(lengths, clusters, seed=0, J=2):
    generator = torch.Generator().manual_seed(seed)
    T = sum(lengths)
    leaves = [torch.randn(T, heads, 8, generator=generator).double() for heads in (4, J, J)]
    leaves.append(torch.rand(T, J, generator=generator).double() + 0.5)
    cluster_TJ = torch.randint(clusters, (T, J), generator=generator, dtype=torch.int32)
    return leaves, cluster_TJ


@pytest.mark.parametrize("lengths", [[29], [5, 0, 21, 1]])
@pytest.mark.parametrize("clusters, window, first", [(3, 4, 2), (3, 0, 0), (1, 4, 1), (4, 0, 3)])
@pytest.mark.parametrize("few", [near_attention.AT_ONCE, 500])
def test_values_and_gradients_are_the_oracles(lengths, clusters, window, first, few, monkeypatch):
    monkeypatch.setattr(near_attention, "AT_ONCE", few)  # scores of a few blocks at a time, or all
    leaves, cluster_TJ = problem(lengths, clusters)
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    grad, results = torch.randn_like(leaves[0]), []
    for ours in (True, False):
        q, k, v, weight = own = [leaf.clone().requires_grad_() for leaf in leaves]
        if ours:
            out = executed(q, k, v, lengths, cluster_TJ, weight, clusters, window, first, 4)
        else:
            how = (offsets, cluster_TJ, weight, window, first)
            out = reference_attention.attend_clusters(q, k, v, *how)
        results.append((out, *torch.autograd.grad(out, own, grad)))
    for one, wanted in zip(*results, strict=True):
        torch.testing.assert_close(one, wanted)


def test_no_tokens():
    leaves, cluster_TJ = problem([0], 2)
    q, k, v, weight = (leaf.requires_grad_() for leaf in leaves)
    out = executed(q, k, v, [0], cluster_TJ, weight, 2, 3, 1, 4)
    assert out.shape == (0, 4, 8)
    assert all(g.shape[0] == 0 for g in torch.autograd.grad(out.sum(), (q, k, v, weight)))


def test_pairs_of_other_clusters_are_not_computed():
    leaves, _ = problem([256], 1)
    cluster_TJ = (torch.arange(256, dtype=torch.int32) % 4)[:, None].expand(-1, 2)
    with FlopCounterMode(display=False) as counter:
        executed(*leaves[:3], [256], cluster_TJ, leaves[3], 4, 0, 0, 16)
    # two products of 256 queries of 4 heads with at most the 4 blocks of 16 keys of their cluster
    assert counter.get_total_flops() == 2 * 2 * 256 * 4 * 64 * 8
