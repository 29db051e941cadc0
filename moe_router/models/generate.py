"""Text from a causal model: a packed prefill, then one token per sequence and pass."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_router.errors import ConfigError, NotCausalError
from moe_router.models.causal_lm import CausalLM, LMOutput
from moe_router.models.kv_cache import KVCache
from moe_router.routing import Context
from moe_router_kernels import reference


@dataclass(frozen=True, slots=True)
class Sampling:
    """Attributes:
    max_new_tokens: at most.
    temperature: 0 is greedy.
    top_k: sample from the k likeliest; 0 is off.
    top_p: sample from the likeliest that hold this much probability.
    seed: names the noise, together with the sequence's index and position.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


@torch.inference_mode()
def generate(
    model: CausalLM,
    prompt_ids: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    stop_id: int | None = None,
    context: Context | None = None,
) -> list[list[int]]:
    """Continue every prompt.

    Args:
        prompt_ids: at least one token each; they may differ in length.
        stop_id: ends a sequence; it is not returned.

    Returns:
        The new tokens of each prompt.

    Raises:
        NotCausalError: the model's routing looks at later tokens.
    """
    _require_causal(model)
    for b, prompt in enumerate(prompt_ids):
        if not prompt:
            raise ConfigError(f"prompt {b}: got no token, want at least one")
    training = model.training
    model.eval()
    try:
        return _decode(model, prompt_ids, sampling, stop_id, context or Context())
    finally:
        model.train(training)


def _decode(
    model: CausalLM,
    prompt_ids: Sequence[Sequence[int]],
    sampling: Sampling,
    stop_id: int | None,
    context: Context,
) -> list[list[int]]:
    device = model.embed.weight.device
    cache = KVCache(len(model.blocks), len(prompt_ids))
    feed: list[list[int]] = [list(prompt) for prompt in prompt_ids]
    done = [False] * len(feed)
    texts: list[list[int]] = [[] for _ in feed]
    for index in range(sampling.max_new_tokens):
        logits_BV = _forward(model, feed, cache, context, device)
        chosen = _sample(logits_BV, sampling, index).tolist()
        for b, token in enumerate(chosen):
            done[b] = done[b] or token == stop_id
            if not done[b]:
                texts[b].append(token)
        if all(done):
            break
        # a finished sequence brings no more tokens
        feed = [[] if end else [token] for end, token in zip(done, chosen, strict=True)]
    return texts


def _forward(
    model: CausalLM, feed: list[list[int]], cache: KVCache, context: Context, device: torch.device
) -> Tensor:
    """(B, V) logits after the last new token of each sequence; those without one repeat row 0."""
    ids = [token for tokens in feed for token in tokens]
    grown = [start + len(tokens) for start, tokens in zip(cache.positions, feed, strict=True)]
    spans = zip(cache.positions, grown, strict=True)
    position = [p for start, end in spans for p in range(start, end)]
    lengths = torch.tensor([0, *map(len, feed)])
    offsets_B1 = lengths.cumsum(0).int()
    cache.positions = grown
    output: LMOutput = model(
        torch.tensor(ids, device=device),
        torch.tensor(position, dtype=torch.int32, device=device),
        offsets_B1.to(device),
        cache=cache,
        context=context,
    )
    last_B = (offsets_B1[1:].long() - 1).clamp(min=0).to(device)
    return output.logits_TV[last_B]


def _sample(logits_BV: Tensor, sampling: Sampling, index: int) -> Tensor:
    """(B,) tokens. The noise of sequence b is its own, whatever else is in the batch."""
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    logits_BV = logits_BV / sampling.temperature
    ranked, order = logits_BV.sort(dim=-1, descending=True, stable=True)
    if sampling.top_k:
        ranked[:, sampling.top_k :] = float("-inf")
    if sampling.top_p < 1:
        before = ranked.softmax(-1).cumsum(-1) - ranked.softmax(-1)
        ranked = ranked.masked_fill(before >= sampling.top_p, float("-inf"))
    uniform_BV = torch.cat(
        [
            reference.uniform_noise(sampling.seed, index, 0, b, 1, ranked.size(1), ranked.device)
            for b in range(len(ranked))
        ]
    )
    # the Gumbel trick: argmax of logits + Gumbel noise draws from the softmax
    gumbel_BV = -torch.log(-torch.log(uniform_BV.clamp(min=1e-10)))
    best_B1 = (ranked + gumbel_BV).argmax(-1, keepdim=True)
    return order.gather(1, best_B1)[:, 0]


def _require_causal(model: CausalLM) -> None:
    for layer, block in enumerate(model.blocks):
        moe = getattr(block, "moe", None)
        if moe is not None and not moe.causal:
            raise NotCausalError(
                f"layer {layer}: policy {moe.config.policy} looks at later tokens to choose, so "
                "this model cannot generate; train with model.moe.policy=top_k"
            )
