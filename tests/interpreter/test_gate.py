"""The gate and the Plan by Triton against the reference, on a GPU or in Triton's interpreter."""

import os
from contextlib import nullcontext

import pytest
import torch

from moe_router_kernels import gate, plan_from_ids, reference, select_top_c, within_capacity
from tests.interpreter.poison import poisoned

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1", allow_module_level=True)
permute = pytest.importorskip("moe_router_kernels.permute")
DEVICE = "cpu" if INTERPRETED else "cuda"


def both(logits_TG, k, **rule):
    """The same by kernel and by reference, with gradients of every differentiable part."""
    results = []
    for kernels in ("triton", "reference"):
        leaf = logits_TG.detach().clone().requires_grad_()
        with poisoned() if kernels == "triton" else nullcontext():
            made = gate(leaf, k, kernels=kernels, sums=True, **rule)
        generator = torch.Generator().manual_seed(5)
        parts = (made.weight_TK, made.share_G, made.z)
        grads = [torch.randn(p.shape, generator=generator).to(DEVICE) for p in parts]
        results.append((made, torch.autograd.grad(parts, leaf, grads)[0]))
    return results


def same(ours, wanted):
    (made, grad), (wanted_made, wanted_grad) = ours, wanted
    assert torch.equal(made.raw_TK, wanted_made.raw_TK)
    for name in ("weight_TK", "share_G", "z"):
        torch.testing.assert_close(getattr(made, name), getattr(wanted_made, name))
    torch.testing.assert_close(grad, wanted_grad, rtol=1e-4, atol=1e-6)
    if wanted_made.plan is not None:
        assert torch.equal(made.load_G, wanted_made.load_G)
        for name, one, other in zip(
            ("src", "choice", "offsets", "row"), made.plan, wanted_made.plan, strict=True
        ):
            assert torch.equal(one, other), name


@pytest.mark.parametrize(
    "T, E, Z, K",
    # one block, a few, and too many for one program to scan
    [(1, 1, 0, 1), (7, 13, 0, 3), (5, 6, 2, 3), (130, 8, 3, 2), (65, 63, 1, 8), (300, 250, 1, 2)],
)
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("biased, renormalise", [(False, True), (True, False)])
def test_equals_the_reference(T, E, Z, K, score, biased, renormalise):
    generator = torch.Generator().manual_seed(T)
    logits_TG = torch.randn(T, E + Z, generator=generator).to(DEVICE)
    bias_E = torch.randn(E, generator=generator).to(DEVICE) * 0.1 if biased else None
    rule = {"experts": E, "score": score, "bias_E": bias_E, "renormalise": renormalise}
    ours, wanted = both(logits_TG, K, **rule)
    same(ours, wanted)
    # choices made elsewhere: some are missing, some are null
    given_TK = wanted[0].raw_TK.clone()
    given_TK[torch.rand(T, K, generator=generator).to(DEVICE) < 0.3] = -1
    same(*both(logits_TG, K, given_TK=given_TK, **rule))


@pytest.mark.parametrize("E, groups, top_groups, K", [(8, 4, 2, 2), (32, 8, 4, 8), (4, 2, 1, 2)])
def test_a_choice_limited_to_groups(E, groups, top_groups, K):
    generator = torch.Generator().manual_seed(E)
    logits_TE = torch.randn(33, E, generator=generator).to(DEVICE)
    bias_E = torch.randn(E, generator=generator).to(DEVICE) * 0.1
    rule = {"experts": E, "score": "sigmoid", "bias_E": bias_E}
    same(*both(logits_TE, K, expert_groups=groups, top_groups=top_groups, **rule))


def test_a_block_has_a_token_for_every_bit():
    T = 4100  # enough for blocks of 32 tokens; one group takes most of them
    logits_TG = torch.randn(T, 8, generator=torch.Generator().manual_seed(0))
    logits_TG[:, 3] += 2
    same(*both(logits_TG.to(DEVICE), 2, experts=8))


def test_the_order_is_that_of_the_logits_where_scores_are_equal():
    logits_TE = torch.tensor([[30.0, 40.0, -0.0, 0.0, 50.0]], device=DEVICE)
    made = gate(logits_TE, 5, experts=5, score="sigmoid", kernels="triton")
    assert made.raw_TK.tolist() == [[4, 1, 0, 2, 3]]


def test_no_tokens():
    ours, wanted = both(torch.empty(0, 4, device=DEVICE), 2, experts=4)
    same(ours, wanted)
    assert ours[0].plan[2].tolist() == [0] * 5 and ours[0].plan[0].numel() == 0


def test_ties_go_to_the_lower_id():
    made = gate(torch.zeros(3, 6, device=DEVICE), 2, experts=6, kernels="triton")
    assert made.raw_TK.tolist() == [[0, 1]] * 3


@pytest.mark.filterwarnings("ignore:invalid value encountered", "ignore:All-NaN slice")
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_logits_that_are_not_finite_still_choose_groups(score, bad):
    logits_TE = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    logits_TE[3, 2] = bad
    logits_TE[9] = bad
    seen = []
    for kernels in ("triton", "reference"):
        made = gate(logits_TE.to(DEVICE), 3, experts=6, score=score, kernels=kernels)
        assert made.raw_TK.min() >= 0 and made.raw_TK.max() < 6
        assert all(len(set(row)) == 3 for row in made.raw_TK.tolist())
        seen.append(made)
    assert torch.equal(seen[0].raw_TK, seen[1].raw_TK)
    torch.testing.assert_close(seen[0].weight_TK, seen[1].weight_TK, equal_nan=True)


@pytest.mark.parametrize(
    "T, K, groups",  # nothing; in one launch; in two; in three
    [(0, 2, 3), (1, 1, 1), (50, 3, 7), (64, 2, 128), (700, 3, 13), (300, 2, 300)],
)
@pytest.mark.parametrize("distinct", [True, False])
def test_a_plan_for_choices_made_elsewhere(T, K, groups, distinct):
    generator = torch.Generator().manual_seed(T)
    target_TK = torch.randint(-1, groups, (T, K), generator=generator).int()
    if not distinct:  # a token may name a group twice, and what is no group
        target_TK[:, -1] = target_TK[:, 0]
        target_TK[T // 2 :, 0] = groups + 3
    target_TK = target_TK.to(DEVICE)
    with poisoned():
        ours = plan_from_ids(target_TK, groups, kernels="triton")
    for one, other in zip(ours, plan_from_ids(target_TK, groups, "reference"), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("T, K, groups, capacity", [(0, 2, 3, 1), (60, 3, 5, 4), (300, 2, 40, 9)])
def test_capacity_keeps_whom_the_reference_keeps(T, K, groups, capacity):
    generator = torch.Generator().manual_seed(T)
    target_TK = torch.randint(-1, groups, (T, K), generator=generator).int().to(DEVICE)
    order_R = torch.randperm(T * K, generator=generator).to(DEVICE)
    kept = [
        within_capacity(target_TK, groups, order_R, capacity, kernels)
        for kernels in ("triton", "reference")
    ]
    assert torch.equal(*kept)
    if T:
        assert (kept[0] < target_TK).any()


@pytest.mark.parametrize("dim", [16, 37, 64, 100, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_are_copied_bit_by_bit(dim, dtype):
    x_TD = torch.randn(40, dim).to(DEVICE, dtype)
    plan = gate(torch.randn(40, 8).to(DEVICE), 2, experts=8).plan
    assert torch.equal(permute.move_rows(x_TD, plan[3]), x_TD[plan[0].long()])


@pytest.mark.parametrize("T, K, dim", [(30, 3, 20), (9, 1, 130), (0, 2, 8)])
def test_rows_and_their_gradients_are_those_of_the_reference(T, K, dim):
    generator = torch.Generator().manual_seed(T)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE)

    target_TK = torch.randint(-1, 4, (T, K), generator=generator).int().to(DEVICE)
    src_R, choice_R, offsets_G1, row_TK = plan_from_ids(target_TK, 4)
    used = int(offsets_G1[-1])
    y_RD, weight_TK, grad_TD = normal(T * K, dim), normal(T, K), normal(T, dim)
    y_RD[used:] = torch.nan
    torch.testing.assert_close(
        permute.combine_rows(y_RD, row_TK, weight_TK), reference.combine(y_RD, weight_TK, row_TK)
    )
    tensors = (grad_TD, y_RD, weight_TK, src_R, choice_R, row_TK)
    for one, other in zip(
        permute.combine_backward(*tensors), reference.combine_backward(*tensors), strict=True
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    "lengths, counts, G",
    [([0, 5, 40, 1], [2, 3, 17, 1], 1), ([30, 30], [4, 4], 6), ([300], [300], 2), ([], [], 3)],
)
@pytest.mark.parametrize("ties, behind", [(True, 0), (False, 0), (False, 5)])
def test_the_best_of_each_segment(lengths, counts, G, ties, behind):
    generator = torch.Generator().manual_seed(len(lengths))
    score_TG = torch.randn(sum(lengths) + behind, G, generator=generator) * 3
    if ties:
        score_TG = score_TG.round()  # with both zeros
        score_TG[1::7] = torch.nan
    offsets_S1 = torch.tensor([0, *lengths]).cumsum(0).int().to(DEVICE)
    count_S = torch.tensor(counts, dtype=torch.int32, device=DEVICE)
    ours, wanted = (
        select_top_c(score_TG.to(DEVICE), offsets_S1, count_S, kernels)
        for kernels in ("triton", "reference")
    )
    assert torch.equal(ours, wanted) and not ours[sum(lengths) :].any()
