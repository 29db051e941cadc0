"""Attention of the chosen pairs alone, in plain torch, against the masked oracle."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moe_router.routing.blocks import Blocks
from moe_router_kernels.attention_op import attend_blocks
from moe_router_kernels.reference_attention import choose_blocks


def problem(lengths, block, k, *, causal, H=4, J=2, d=8):
    torch.manual_seed(sum(lengths))
    blocks = Blocks.of(lengths, block, torch.device("cpu"), causal=causal)
    N = len(blocks.first_N)
    bounds = (blocks.own_N, blocks.low_N, blocks.high_N)
    target = choose_blocks(torch.randn(N, J, N), *bounds, k)
    leaves = [torch.randn(sum(lengths), heads, d).double() for heads in (H, J, J)]
    return leaves, (blocks.first_N, blocks.last_N, target, block)


@pytest.mark.parametrize("lengths, block, k", [([13], 4, 2), ([5, 0, 21, 1], 5, 3), ([6], 8, 4)])
@pytest.mark.parametrize("causal, gated", [(True, False), (True, True), (False, True)])
def test_values_and_gradients_are_the_oracles(lengths, block, k, causal, gated):
    leaves, lists = problem(lengths, block, k, causal=causal)
    if gated:
        leaves.append(torch.rand(lists[2].shape).double())
    grad, results = torch.randn_like(leaves[0]), []
    for kernels in ("reference", "auto"):
        own = [leaf.clone().requires_grad_() for leaf in leaves]
        how = {"gate_NJK": own[3] if gated else None, "causal": causal, "kernels": kernels}
        out = attend_blocks(*own[:3], *lists, **how)
        results.append((out, *torch.autograd.grad(out, own, grad)))
    for ours, wanted in zip(*results, strict=True):
        torch.testing.assert_close(ours, wanted)


def test_a_query_that_chose_nothing_gets_nothing():
    leaves, (first, last, target, block) = problem([13], 4, 2, causal=True)
    target[1] = -1
    leaves = [leaf.requires_grad_() for leaf in leaves]
    for kernels in ("reference", "auto"):
        out = attend_blocks(*leaves, first, last, target, block, kernels=kernels)
        assert (out[4:8] == 0).all() and (out[8:] != 0).any()
        assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), leaves))


def test_pairs_that_were_not_chosen_are_not_computed():
    leaves, lists = problem([256], 16, 2, causal=True)
    with FlopCounterMode(display=False) as counter:
        attend_blocks(*leaves, *lists)
    # two products of 256 queries of 4 heads with 2 blocks of 16 keys of 8 channels
    assert counter.get_total_flops() == 2 * 2 * 256 * 4 * 32 * 8
