"""The fused gate and permutation against the reference, on a GPU or in Triton's interpreter."""

import os

import pytest
import torch

from moe_router_kernels import reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1", allow_module_level=True)
fused = pytest.importorskip("moe_router_kernels.fused")
DEVICE = "cpu" if INTERPRETED else "cuda"


@pytest.mark.parametrize(
    "T, E, Z, K", [(1, 1, 0, 1), (7, 13, 0, 3), (130, 8, 3, 2), (65, 63, 1, 8)]
)
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("biased, renormalise", [(False, True), (True, False)])
def test_equals_the_reference(T, E, Z, K, score, biased, renormalise):
    generator = torch.Generator().manual_seed(T)
    logits_TG = torch.randn(T, E + Z, generator=generator).to(DEVICE)
    bias_E = torch.randn(E, generator=generator).to(DEVICE) * 0.1 if biased else None
    x_TD = torch.randn(T, 37, generator=generator).to(DEVICE)
    out = fused.gate_and_plan(
        logits_TG, K, experts=E, score=score, bias_E=bias_E, renormalise=renormalise, x_TD=x_TD
    )
    score_TG = reference.score(logits_TG, score)
    ranked_TG = score_TG.clone()
    if bias_E is not None:
        ranked_TG[:, :E] += bias_E
    raw_TK = reference.top_k(ranked_TG, K)
    target_TK = raw_TK.masked_fill(raw_TK >= E, -1)
    assert torch.equal(out["target_TK"], target_TK)
    assert torch.equal(out["load_G"].long(), reference.count(raw_TK, E + Z))
    wanted = reference.choice_weights(score_TG, target_TK, renormalise)
    torch.testing.assert_close(out["weight_TK"], wanted)
    names = ("src_R", "choice_R", "offsets_G1", "row_TK")
    for name, tensor in zip(names, reference.plan(target_TK, E), strict=True):
        assert torch.equal(out[name], tensor), name
    used = int(out["offsets_G1"][-1])
    assert torch.equal(out["rows_RD"][:used], reference.gather(x_TD, out["src_R"])[:used])


@pytest.mark.parametrize("E, groups, top_groups, K", [(8, 4, 2, 2), (32, 8, 4, 8), (4, 2, 1, 2)])
def test_a_choice_limited_to_groups(E, groups, top_groups, K):
    generator = torch.Generator().manual_seed(E)
    logits_TE = torch.randn(33, E, generator=generator).to(DEVICE)
    bias_E = torch.randn(E, generator=generator).to(DEVICE) * 0.1
    limit = {"expert_groups": groups, "top_groups": top_groups}
    out = fused.gate_and_plan(logits_TE, K, experts=E, score="sigmoid", bias_E=bias_E, **limit)
    score_TE = reference.score(logits_TE, "sigmoid")
    ranked_TE = reference.limit_groups(score_TE + bias_E, groups, top_groups)
    target_TK = reference.top_k(ranked_TE, K)
    assert torch.equal(out["target_TK"], target_TK)
    torch.testing.assert_close(
        out["weight_TK"], reference.choice_weights(score_TE, target_TK, True)
    )


def test_no_tokens():
    out = fused.gate_and_plan(torch.empty(0, 4, device=DEVICE), 2, experts=4)
    assert out["offsets_G1"].tolist() == [0] * 5 and out["src_R"].numel() == 0


@pytest.mark.parametrize("dim", [16, 64, 100, 512])
def test_bf16_tokens_are_copied_bit_by_bit(dim):
    x_TD = torch.randn(40, dim).bfloat16().to(DEVICE)
    out = fused.gate_and_plan(torch.randn(40, 8).to(DEVICE), 2, experts=8, x_TD=x_TD)
    assert torch.equal(out["rows_RD"], x_TD[out["src_R"].long()])


def test_ties_go_to_the_lower_id():
    out = fused.gate_and_plan(torch.zeros(3, 6, device=DEVICE), 2, experts=6)
    assert out["target_TK"].tolist() == [[0, 1]] * 3
