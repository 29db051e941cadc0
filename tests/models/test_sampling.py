import pytest
import torch

from moe_router.errors import ConfigError
from moe_router.models import Sampling
from moe_router.models.sampling import Draws, sample, sampling_noise

PROBABILITY = torch.tensor([0.1, 0.4, 0.0, 0.3, 0.2])
CPU = torch.device("cpu")


def shares(**settings):
    """How often each token is drawn over evenly spread noise."""
    uniform_B = (torch.arange(1000) + 0.5) / 1000
    logits_BV = PROBABILITY.log().expand(1000, -1)
    draws = Draws.of([Sampling(**{"temperature": 1.0} | settings)], CPU)
    token_B = sample(logits_BV, uniform_B, draws)
    return token_B.bincount(minlength=5) / 1000


def check(got, *wanted):
    torch.testing.assert_close(got, torch.tensor(wanted, dtype=torch.float32), atol=0.002, rtol=0)


def test_tokens_are_drawn_by_their_probability():
    check(shares(), 0.1, 0.4, 0.0, 0.3, 0.2)


def test_top_k_and_top_p_leave_the_likeliest():
    check(shares(top_k=2), 0, 4 / 7, 0, 3 / 7, 0)
    check(shares(top_p=0.75), 0, 4 / 9, 0, 3 / 9, 2 / 9)
    check(shares(top_p=0.3), 0, 1, 0, 0, 0)
    check(shares(top_p=0.75, top_k=2), 0, 4 / 7, 0, 3 / 7, 0)
    check(shares(top_k=50), 0.1, 0.4, 0.0, 0.3, 0.2)


def test_a_temperature_sharpens_and_0_is_greedy():
    squared = PROBABILITY.square() / PROBABILITY.square().sum()
    check(shares(temperature=0.5), *squared.tolist())
    check(shares(temperature=0.0), 0, 1, 0, 0, 0)


def test_sequences_of_a_batch_choose_each_in_its_own_way():
    ways = [{}, {"top_k": 2}, {"temperature": 0.0}, {"top_p": 0.75}, {"temperature": 0.5}]
    samplings = [Sampling(**{"temperature": 1.0} | way) for way in ways]
    uniform_B = torch.rand(50, generator=torch.Generator().manual_seed(0))
    logits_BV = PROBABILITY.log().expand(50, -1)
    alone = [sample(logits_BV, uniform_B, Draws.of([one], CPU)) for one in samplings]
    for u, *wanted in zip(uniform_B, *alone, strict=True):
        got = sample(logits_BV[:5], u.expand(5), Draws.of(samplings, CPU))
        assert got.tolist() == [int(token) for token in wanted]


def test_the_greatest_noise_takes_a_token_that_has_a_probability():
    logits_BV = torch.tensor([[0.0, 0.0, -torch.inf]])
    token_B = sample(
        logits_BV, torch.tensor([1 - 2.0**-24]), Draws.of([Sampling(temperature=1)], CPU)
    )
    assert token_B.tolist() == [1]


def test_noise_is_named_by_seed_prompt_and_step():
    prompts = [[1, 2], [3], [1, 2]]
    noise = sampling_noise(prompts, Sampling(max_new_tokens=5), CPU)
    assert noise.shape == (3, 5) and noise.unique().numel() == 10
    assert torch.equal(noise[1:2], sampling_noise([[3]], Sampling(max_new_tokens=5), CPU))
    other = sampling_noise(prompts, Sampling(max_new_tokens=5, seed=1), CPU)
    assert not (other == noise).any()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"temperature": -1.0}, r"temperature=-1.0: want 0 or more"),
        ({"top_p": 0.0}, r"top_p=0.0: want 0 < top_p <= 1"),
        ({"top_k": -1}, r"top_k=-1: want 0 \(all\) to 2147483647"),
        ({"max_new_tokens": 0}, r"max_new_tokens=0: want 1 or more"),
    ],
)
def test_impossible_settings_are_refused(setting, message):
    with pytest.raises(ConfigError, match=message):
        Sampling(**setting)


@pytest.mark.parametrize(
    "settings", [{"temperature": 1e-45}, {"temperature": 5e-324}, {"top_p": 5e-324}]
)
def test_what_is_all_but_zero_takes_the_likeliest_token(settings):
    logits_BV = torch.tensor([[1.0, -90.0, 3.0, 2.0]])
    draws = Draws.of([Sampling(**{"temperature": 1.0} | settings)], CPU)
    for uniform in (0.0, 0.5, 1 - 2.0**-24):
        assert sample(logits_BV, torch.tensor([uniform]), draws).tolist() == [2]


def test_a_rank_past_every_vocabulary_is_refused():
    with pytest.raises(ConfigError, match=r"top_k=2147483648: want 0 \(all\) to 2147483647"):
        Sampling(top_k=2**31)
