"""From logits to the next token. Noise is named, never drawn from a state: a sequence's tokens do
not depend on what is generated beside it."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_router.config import require
from moe_router.models.transfer import upload
from moe_router_kernels import reference

MOST = 2**31 - 1  # of top_k: more than any vocabulary, and an integer of the device
LEAST = 1e-30  # of top_p and temperature: above 0 in fp32, and logits over it are finite


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """Attributes:
    max_new_tokens: of each sequence.
    temperature: divides the logits; 0 takes the likeliest token.
    top_k: the likeliest tokens to choose among; 0 is all.
    top_p: the likeliest tokens whose probabilities reach this sum; 1 is all.
    seed: equal prompts under equal seeds give equal texts.
    """

    max_new_tokens: int = 200
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "1 or more")
        require(self.temperature >= 0, "temperature", self.temperature, "0 or more")
        require(0 <= self.top_k <= MOST, "top_k", self.top_k, f"0 (all) to {MOST}")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "0 < top_p <= 1")


def sampling_noise(
    prompts: Sequence[Sequence[int]], sampling: Sampling, device: torch.device
) -> Tensor:
    """(B, max_new_tokens) fp32 in [0, 1): a function of the seed, the prompt and the step."""
    steps = sampling.max_new_tokens
    names = [zlib.crc32(",".join(map(str, prompt)).encode()) for prompt in prompts]
    cpu = torch.device("cpu")
    rows = [reference.uniform_noise(sampling.seed, name, 0, 0, 1, steps, cpu) for name in names]
    return torch.cat(rows).to(device)


@dataclass(frozen=True, slots=True)
class Draws:
    """How the sequences of a batch choose, on the device; one row serves a batch that is alike.

    Attributes:
        temperature_B1, top_p_B1: fp32.
        top_k_B1: int64.
        drawn: some sequence draws; else all take the likeliest token.
        ranked: some sequence wants the likeliest tokens alone.
    """

    temperature_B1: Tensor
    top_k_B1: Tensor
    top_p_B1: Tensor
    drawn: bool
    ranked: bool

    @classmethod
    def of(cls, samplings: Sequence[Sampling], device: torch.device) -> "Draws":
        # a sum of rounded probabilities may pass 1 before the last token
        top_p = [max(one.top_p, LEAST) if one.top_p < 1 else 2.0 for one in samplings]
        top_k = [one.top_k or 1 << 40 for one in samplings]
        temperature = [one.temperature and max(one.temperature, LEAST) for one in samplings]
        return cls(
            upload(torch.tensor(temperature, dtype=torch.float32)[:, None], device),
            upload(torch.tensor(top_k)[:, None], device),
            upload(torch.tensor(top_p, dtype=torch.float32)[:, None], device),
            any(one.temperature > 0 for one in samplings),
            any(one.temperature > 0 and (one.top_k or one.top_p < 1) for one in samplings),
        )


def sample(logits_BV: Tensor, uniform_B: Tensor, draws: Draws) -> Tensor:
    """The next token of each sequence.

    Args:
        logits_BV: fp32.
        uniform_B: fp32 in [0, 1), one number a sequence.

    Returns:
        (B,) int64.
    """
    likeliest_B = logits_BV.argmax(-1)
    if not draws.drawn:
        return likeliest_B
    heat_B1 = draws.temperature_B1
    probability_BV = (logits_BV / torch.where(heat_B1 > 0, heat_B1, 1.0)).softmax(-1)
    if draws.ranked:
        probability_BV = probability_BV * _likely(probability_BV, draws)
    # invert the distribution in order of ids: rounding that swaps two near-equal probabilities
    # then changes nothing, as it would in order of rank
    reached_BV = probability_BV.cumsum(-1)
    goal_B1 = uniform_B[:, None] * reached_BV[:, -1:]
    token_B = (reached_BV <= goal_B1).sum(-1)
    # u * total may round up to the total, past the last token that has a probability
    last_B = probability_BV.size(-1) - 1 - (probability_BV.flip(-1) > 0).int().argmax(-1)
    return torch.where(heat_B1[:, 0] > 0, torch.minimum(token_B, last_B), likeliest_B)


def _likely(probability_BV: Tensor, draws: Draws) -> Tensor:
    """Bool (B, V): the tokens that top_k and top_p leave."""
    ranked_BV, id_BV = probability_BV.sort(stable=True, dim=-1, descending=True)
    # the token that reaches top_p is still taken, so at least one is
    kept_BV = ranked_BV.cumsum(-1) - ranked_BV < draws.top_p_B1
    rank_V = torch.arange(kept_BV.size(1), device=kept_BV.device)
    kept_BV &= rank_V < draws.top_k_B1
    return torch.zeros_like(kept_BV).scatter_(1, id_BV, kept_BV)
