from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_router.config import RouterConfig
from moe_router.errors import ConfigError
from moe_router.routing import Context, PlanMemory, Router
from moe_router.routing.decide import capacity
from moe_router.routing.score import make_score
from moe_router.types import NoiseKey, Tokens


def tokens(T=12, D=8, seed=0, sequences=(0, 5, 12)):
    generator = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(T, D, generator=generator)
    offsets_B1 = torch.tensor(sequences, dtype=torch.int32)
    starts_T = torch.repeat_interleave(offsets_B1[:-1], offsets_B1.diff())
    return Tokens(x_TD, torch.arange(T, dtype=torch.int32) - starts_T, offsets_B1)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalise", [True, False])
def test_weights_are_the_scores_of_the_chosen(score, renormalise):
    config = RouterConfig(experts=6, top_k=2, score=score, renormalise=renormalise, scale=2.5)
    router = Router(8, config)
    given_tokens = tokens()
    choice = router(given_tokens)
    logits_TE = given_tokens.x_TD @ router.score.weight.T
    score_TE = logits_TE.softmax(-1) if score == "softmax" else logits_TE.sigmoid()
    best = score_TE.topk(2)
    assert torch.equal(choice.target_TK, best.indices.int())
    wanted = best.values / best.values.sum(-1, keepdim=True) if renormalise else best.values
    torch.testing.assert_close(choice.weight_TK, 2.5 * wanted)


def test_bias_moves_the_choice_but_not_the_weight():
    config = RouterConfig(experts=3, top_k=1, renormalise=False, bias_rate=0.1)
    router = Router(3, config)
    router.score.weight.data = torch.eye(3)
    router.bias_E += torch.tensor([0.0, 0.0, 0.4])
    offsets_B1 = torch.tensor([0, 1], dtype=torch.int32)
    logits_TE = torch.tensor([[0.5, 0.3, 0.2]]).log()
    choice = router(Tokens(logits_TE, torch.zeros(1, dtype=torch.int32), offsets_B1))
    assert choice.target_TK.tolist() == [[2]]
    assert choice.weight_TK.tolist() == [[pytest.approx(0.2)]]


def test_bias_update_lifts_the_starved_and_is_kept_in_the_state_only_when_used():
    router = Router(8, RouterConfig(experts=4, top_k=1, bias_rate=0.5))
    router.update_bias(torch.tensor([8, 4, 4, 0]))
    assert router.bias_E.tolist() == [-0.5, 0.0, 0.0, 0.5]
    assert "bias_E" in router.state_dict()
    assert "bias_E" not in Router(8, RouterConfig(experts=4, top_k=1)).state_dict()


def test_the_bias_update_balances_a_skewed_router():
    torch.manual_seed(0)
    router = Router(16, RouterConfig(experts=8, top_k=2, bias_rate=0.01, balance_loss=0))
    batch = tokens(512, 16, sequences=(0, 512))
    batch = Tokens(batch.x_TD + 1.0, batch.position_T, batch.offsets_B1)  # a common direction skews

    def imbalance():
        load_E = torch.bincount(router(batch).target_TK.flatten(), minlength=8)
        router.update_bias(load_E)
        return float(load_E.max() / load_E.float().mean())

    first = imbalance()
    for _ in range(200):
        last = imbalance()
    assert first > 1.8 and last < 1.15


def test_null_experts_get_no_target_and_leave_the_weight_to_the_real_ones():
    router = Router(8, RouterConfig(experts=4, top_k=2, null_experts=4))
    choice = router(tokens(64, sequences=(0, 64)))
    real_TK = choice.target_TK >= 0
    assert 0 < (~real_TK).sum() < real_TK.numel()
    assert (choice.weight_TK[~real_TK] == 0).all()
    some_T = real_TK.any(-1)
    torch.testing.assert_close(choice.weight_TK.sum(-1)[some_T], torch.ones(int(some_T.sum())))


def test_straight_through_weighs_hard_and_learns_soft():
    config = {"experts": 4, "top_k": 2, "renormalise": False, "balance_loss": 0}
    hard = Router(8, RouterConfig(**config, straight_through=True))
    soft = Router(8, RouterConfig(**config))
    soft.load_state_dict(hard.state_dict())
    grads = []
    for router in (hard, soft):
        weight_TK = router(tokens()).weight_TK
        (weight_TK * torch.arange(24.0).view(12, 2)).sum().backward()
        grads.append(router.score.weight.grad)
    assert (hard(tokens()).weight_TK == 0.5).all()
    torch.testing.assert_close(grads[0], grads[1])


def test_jitter_is_for_training_and_named_by_its_key():
    router = Router(8, RouterConfig(experts=4, top_k=2, jitter=0.3), layer=2)
    plain = Router(8, RouterConfig(experts=4, top_k=2), layer=2)
    plain.load_state_dict(router.state_dict())
    key = Context(NoiseKey(seed=1, step=5))
    noisy = router(tokens(), key).weight_TK
    assert torch.equal(noisy, router(tokens(), key).weight_TK)
    assert not torch.equal(noisy, router(tokens(), Context(NoiseKey(seed=1, step=6))).weight_TK)
    router.eval()
    assert torch.equal(router(tokens(), key).weight_TK, plain(tokens()).weight_TK)


def test_losses_of_two_halves_sum_to_the_loss_of_the_whole():
    """What each rank computes from its tokens and the global counts adds up to one rank's loss."""
    config = RouterConfig(
        experts=4, top_k=2, balance_loss=1, z_loss=1, sequence_balance_loss=1, null_experts=2
    )
    router = Router(8, config)
    whole = tokens()
    both = router(whole).losses
    counts = []
    router(whole, total=lambda x: counts.append(x) or x)
    halves = [
        Tokens(whole.x_TD[a:b], whole.position_T[a:b], torch.tensor([0, b - a], dtype=torch.int32))
        for a, b in [(0, 5), (5, 12)]
    ]
    shares = [router(half, total=lambda _: counts[0]).losses for half in halves]
    assert set(both) == {"balance", "z", "sequence_balance"}
    for name, loss in both.items():
        torch.testing.assert_close(shares[0][name] + shares[1][name], loss)


def test_memory_repeats_the_choice_and_asks_the_other_ranks_once():
    router = Router(8, RouterConfig(experts=4, top_k=1, bias_rate=1.0))
    calls = []
    context = Context(memory=PlanMemory())
    first = router(tokens(), context, lambda x: calls.append(1) or x)
    router.update_bias(torch.tensor([9.0, 0, 0, 0]))  # would change the choice
    again = router(tokens(), context, lambda x: calls.append(1) or x)
    assert torch.equal(first.target_TK, again.target_TK) and len(calls) == 1
    assert not torch.equal(first.target_TK, router(tokens()).target_TK)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 40), st.integers(1, 8), st.floats(0.1, 3))
def test_capacity_is_a_multiple_of_the_mean_load(T, experts, factor):
    config = RouterConfig(experts=experts, top_k=1, capacity_factor=factor)
    mean = Fraction(str(factor)) * T / experts
    assert min(T, mean) <= capacity(T, config) <= min(T, mean + 1)


def test_capacity_is_not_rounded_up_because_of_floats():
    assert capacity(100, RouterConfig(experts=10, top_k=1, capacity_factor=1.1)) == 11


def test_a_bf16_module_keeps_its_bias_and_the_bias_goes_on_learning():
    router = Router(8, RouterConfig(experts=2, top_k=1, bias_rate=0.001))
    router.update_bias(torch.tensor([0, 2]))
    before_E = router.bias_E.clone()
    router = router.bfloat16()
    assert router.score.weight.dtype == torch.bfloat16 and torch.equal(router.bias_E, before_E)
    for _ in range(999):
        router.update_bias(torch.tensor([0, 2]))
    torch.testing.assert_close(router.bias_E, torch.tensor([1.0, -1.0]))
    assert router.double().bias_E.dtype == torch.float64


def test_scores_that_are_all_zero_have_finite_losses():
    config = RouterConfig(experts=4, top_k=2, score="sigmoid", sequence_balance_loss=1.0)
    router = Router(8, config)
    router.score.weight.data.fill_(-100.0)
    ones = Tokens(torch.ones(3, 8), torch.arange(3), torch.tensor([0, 3], dtype=torch.int32))
    losses = router(ones).losses
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert router.score.weight.grad.isfinite().all()


def test_frozen_router_has_nothing_to_train():
    router = Router(8, RouterConfig(experts=4, top_k=1, frozen=True))
    assert not any(p.requires_grad for p in router.parameters())


def test_impossible_top_k_says_what_fits():
    with pytest.raises(ConfigError, match=r"model\.moe\.top_k=9: want 1\.\.8 \(model\.moe\.exp"):
        RouterConfig(experts=8, top_k=9)
    with pytest.raises(ConfigError, match="at most 2, the experts in top_groups groups"):
        RouterConfig(experts=8, top_k=3, expert_groups=4, top_groups=1)


def test_the_position_router_sees_no_content():
    router = Router(8, RouterConfig(experts=4, top_k=2, router="position"))
    assert torch.equal(router(tokens(seed=0)).weight_TK, router(tokens(seed=1)).weight_TK)
    shifted = Tokens(tokens().x_TD, tokens().position_T + 7, tokens().offsets_B1)
    assert not torch.equal(router(tokens()).weight_TK, router(shifted).weight_TK)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 17])
def test_on_a_gpu_16_bit_is_scored_in_fp32_without_casts(tokens, dtype):
    torch.manual_seed(0)
    score = make_score(2048, 128, "linear", 0).to("cuda", dtype)
    x_TD = torch.randn(tokens, 2048, device="cuda").to(dtype)
    exact = x_TD.double() @ score.weight.double().T
    with torch.no_grad():
        got = score(x_TD, None)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-4)
