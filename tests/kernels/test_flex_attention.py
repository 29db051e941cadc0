"""A second check of routed attention, by somebody else's code: torch's FlexAttention, unfused.

FlexAttention has no backward pass on a CPU, so there our gradients are held against differences of
its forward pass; on a GPU against its own gradients.
"""

from functools import partial

import pytest
import torch
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

from moe_router.routing.blocks import Blocks
from moe_router_kernels.attention_op import attend_blocks
from moe_router_kernels.cluster_attention import attend_clusters, sort_by_cluster
from moe_router_kernels.near_attention import Band
from moe_router_kernels.reference_attention import choose_blocks, cluster_mask

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
LENGTHS, H, J = [5, 0, 39, 1], 4, 2
T = sum(LENGTHS)


def flex(q_THd, k_TJd, v_TJd, mask_JTT, gate_JTT):
    """p_ij A_ij: the softmax of scores + log p, times the quotient of the two sums."""
    qkv = [x.transpose(0, 1)[None] for x in (q_THd, k_TJd, v_TJd)]
    seen = create_block_mask(
        lambda b, h, i, j: mask_JTT[h * J // H, i, j], 1, H, T, T, device=q_THd.device
    )
    how = {"block_mask": seen, "enable_gqa": True, "return_aux": AuxRequest(lse=True)}
    plain, sums = flex_attention(*qkv, **how)
    if gate_JTT is None:
        return plain[0].transpose(0, 1)
    gated, gated_sums = flex_attention(
        *qkv, score_mod=lambda s, b, h, i, j: s + gate_JTT[h * J // H, i, j].log(), **how
    )
    scaled = gated * (gated_sums.lse - sums.lse).exp()[..., None]
    return scaled[0].transpose(0, 1)


def of_blocks(causal, gated, device, block):
    """What is attended to, and both ways of it, as functions of queries, keys, values, gates."""
    blocks = Blocks.of(LENGTHS, block, device, causal=causal)
    N, generator = len(blocks.first_N), torch.Generator().manual_seed(0)
    score = torch.randn(N, J, N, generator=generator).to(device)
    target = choose_blocks(score, blocks.own_N, blocks.low_N, blocks.high_N, 2)
    block_T = torch.arange(N, device=device).repeat_interleave(blocks.last_N - blocks.first_N)
    pair_NJKN = target[..., None] == torch.arange(N, device=device)
    mask_JTT = pair_NJKN.any(2).transpose(0, 1)[:, block_T][:, :, block_T]
    mask_JTT = mask_JTT.tril() if causal else mask_JTT

    def ours(q, k, v, gate):
        how = {"gate_NJK": gate if gated else None, "causal": causal}
        return attend_blocks(q, k, v, blocks.first_N, blocks.last_N, target, block, **how)

    def theirs(q, k, v, gate):
        gate_JNN = (pair_NJKN * gate[..., None]).sum(2).transpose(0, 1)
        # of pairs nobody attends to the logarithm would have no gradient
        gate_JTT = gate_JNN[:, block_T][:, :, block_T].masked_fill(~mask_JTT, 1.0)
        return flex(q, k, v, mask_JTT, gate_JTT if gated else None)

    return target.shape, ours, theirs


def of_clusters(device, block):
    offsets = torch.tensor([0, *LENGTHS], device=device).cumsum(0).int()
    cluster_TJ = torch.randint(3, (T, J), generator=torch.Generator().manual_seed(1)).to(device)
    cluster_TJ = cluster_TJ.int()
    mask_JTT = torch.stack([cluster_mask(offsets, c_T, 4, 2) for c_T in cluster_TJ.T])
    alike_JTT = cluster_TJ.T[:, :, None] == cluster_TJ.T[:, None]

    def ours(q, k, v, weight):
        blocks = Blocks.of(LENGTHS, block, device)
        low = blocks.first_N[blocks.low_N]
        band = Band(blocks.first_N, blocks.last_N, low, block, 4, 2, T)
        rows = sort_by_cluster(offsets, cluster_TJ, 3, block, max(LENGTHS), "auto")
        return attend_clusters(q, k, v, cluster_TJ, weight, rows, band, block)

    def theirs(q, k, v, weight):
        p_JTT = weight.T[:, :, None] * weight.T[:, None]
        return flex(q, k, v, mask_JTT, torch.where(alike_JTT, p_JTT, 1.0))

    return (T, J), ours, theirs


CASES = {
    "causal": partial(of_blocks, True, False),
    "modulated": partial(of_blocks, True, True),
    "both sides": partial(of_blocks, False, True),
    "clusters": of_clusters,
}


def problem(name, device, block, channels, dtype):
    """Both ways, leaves, and what the output is weighed by."""
    gate_shape, ours, theirs = CASES[name](torch.device(device), block)
    shapes = [(T, H, channels), (T, J, channels), (T, J, channels), gate_shape]
    generator = torch.Generator().manual_seed(2)
    leaves = [torch.randn(shape, generator=generator) for shape in shapes]
    leaves[3] = leaves[3].sigmoid() + 0.1
    leaves = [leaf.to(device, dtype).requires_grad_() for leaf in leaves]
    return ours, theirs, leaves, torch.randn(shapes[0], generator=generator).to(device, dtype)


@pytest.mark.parametrize("name", CASES)
def test_values_and_slopes_are_flex_attentions(name):
    ours, theirs, leaves, weight = problem(name, "cpu", 4, 8, torch.float64)
    out, plain = ours(*leaves), [leaf.detach() for leaf in leaves]
    torch.testing.assert_close(out.detach(), theirs(*plain))
    grads = torch.autograd.grad((out * weight).sum(), leaves, allow_unused=True)
    for i, grad in enumerate(grads):
        if grad is None:  # of a gate that is not in use
            assert (name, i) == ("causal", 3)
            continue
        for seed in range(2):
            way = torch.randn(grad.shape, generator=torch.Generator().manual_seed(seed)).double()
            ends = []
            for step in (1e-5, -1e-5):
                moved = [x + step * way if at == i else x for at, x in enumerate(plain)]
                ends.append((theirs(*moved) * weight).sum())
            slope = (ends[0] - ends[1]) / 2e-5
            torch.testing.assert_close((grad * way).sum(), slope, rtol=1e-6, atol=1e-8)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_triton_values_and_gradients_are_flex_attentions(name):
    ours, theirs, leaves, weight = problem(name, "cuda", 16, 16, torch.float32)
    results = []
    for way in (ours, theirs):
        out = way(*leaves)
        grads = torch.autograd.grad((out * weight).sum(), leaves, allow_unused=True)
        results.append([x for x in (out, *grads) if x is not None])
    for one, other in zip(*results, strict=True):
        assert (one - other).norm() < 1e-4 * other.norm()
