"""Means of blocks and the choice among them by Triton, on a GPU or interpreted."""

import os

import pytest
import torch

from moe_router.routing.blocks import Blocks
from moe_router_kernels import attention_op, block_choice_op, reference_attention
from tests.interpreter.poison import poisoned

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton")
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")


@pytest.mark.parametrize("lengths, block", [([40], 16), ([5, 0, 33], 7), ([], 16)])
def test_means_and_their_gradient_are_the_references(lengths, block):
    generator = torch.Generator().manual_seed(0)
    blocks = Blocks.of(lengths, block, DEVICE)
    x = torch.randn(sum(lengths), 6, 24, generator=generator).to(DEVICE).requires_grad_()
    bounds = (blocks.first_N, blocks.last_N)
    wanted = reference_attention.block_means(x, *bounds, 2)
    grad = torch.randn(wanted.shape, generator=generator).to(DEVICE)
    (wanted_grad,) = torch.autograd.grad(wanted, x, grad)
    with poisoned():
        got = block_choice_op.block_means(x, *bounds, 2, block, "triton")
        (got_grad,) = torch.autograd.grad(got, x, grad)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(got_grad, wanted_grad)
    if block == 7:
        torch.library.opcheck(block_choice_op._block_means.op, (x, *bounds, 2, block))


@pytest.mark.parametrize("lengths, block", [([40], 8), ([5, 0, 33], 7), ([], 16)])
@pytest.mark.parametrize("causal", [True, False])
def test_routing_is_the_references(lengths, block, causal):
    generator = torch.Generator().manual_seed(0)
    blocks = Blocks.of(lengths, block, DEVICE, causal=causal)
    q, k = (torch.randn(sum(lengths), n, 24, generator=generator).to(DEVICE) for n in (6, 2))
    where = (blocks.first_N, blocks.last_N, blocks.own_N, blocks.low_N, blocks.high_N, block)
    for top_k, window in ((3, 0), (4, 1), (20, 0)):
        arguments, results = (q, k, *where, top_k, window), []
        for kernels in ("triton", "reference"):
            with poisoned():
                chosen = block_choice_op.route_blocks(*arguments, causal=causal, kernels=kernels)
            results.append(chosen)
        assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
        target, count = results[0]
        easy = attention_op.unmasked(*where[:2], target, block, causal)
        in_order, wanted, _ = attention_op.by_mask(target, easy)
        assert torch.equal(target, in_order) and torch.equal(count, wanted)
    if block == 7:
        torch.library.opcheck(block_choice_op._route_blocks.op, (*arguments, causal))


@pytest.mark.parametrize("lengths, causal", [([16], True), ([5, 0, 9, 1], False), ([], True)])
@pytest.mark.parametrize("k, window", [(1, 0), (3, 1), (60, 0)])
def test_the_choice_is_the_references(lengths, causal, k, window):
    generator = torch.Generator().manual_seed(k)
    blocks = Blocks.of(lengths, 2, DEVICE, causal=causal)
    N = blocks.first_N.numel()
    # few values: many are equal; some are no numbers, some are zeros of either sign
    score = torch.randint(-3, 3, (N, 2, N), generator=generator) / 2.0
    score[torch.rand(score.shape, generator=generator) < 0.1] = float("nan")
    score[torch.rand(score.shape, generator=generator) < 0.1] = -0.0
    arguments = (score.to(DEVICE), blocks.own_N, blocks.low_N, blocks.high_N, k, window)
    with poisoned():
        got = block_choice_op.choose_blocks(*arguments, "triton")
    assert torch.equal(got, block_choice_op.choose_blocks(*arguments, "reference"))
    half = arguments[0].half()  # every score here is one in 16 bit, too
    assert torch.equal(got, block_choice_op.choose_blocks(half, *arguments[1:], "triton"))
    if N and k == 1:
        torch.library.opcheck(block_choice_op._choose_blocks.op, (*arguments, True))
