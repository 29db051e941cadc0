"""Text from a model: one prefill of packed prompts, then a token per sequence and step."""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from moe_router.errors import ConfigError, NotCausalError
from moe_router.models.causal_lm import CausalLM, LMOutput
from moe_router.models.kv_cache import KVCache
from moe_router.models.sampling import Draws, Sampling, sample, sampling_noise
from moe_router.routing import Context


@torch.no_grad()
def generate(
    model: CausalLM,
    prompt_ids: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    stop_id: int | None = None,
    context: Context | None = None,
) -> list[list[int]]:
    """Continue each prompt, dropless and without jitter.

    Args:
        prompt_ids: token ids, at least one in each prompt; lengths may differ.
        sampling: how to choose tokens, and how many.
        stop_id: ends a sequence; it is not part of the result.
        context: ledger and observer of the routed layers.

    Returns:
        The new tokens of each prompt.

    Raises:
        NotCausalError: a layer's routing looks at later tokens.
        ConfigError: a prompt is empty or holds an id outside the vocabulary.
    """
    require_causal(model)
    check_prompts(prompt_ids, model.vocab)
    was_training = model.training
    model.eval()
    try:
        return _decode(model, prompt_ids, sampling, stop_id, context) if prompt_ids else []
    finally:
        model.train(was_training)


def _decode(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    stop_id: int | None,
    context: Context | None,
) -> list[list[int]]:
    device = model.embed.weight.device
    noise_BN = sampling_noise(prompts, sampling, device)
    most = sum(map(len, prompts)) + len(prompts) * sampling.max_new_tokens
    cache = KVCache(model.config.steps, len(prompts), reserve=most)
    length_B = torch.tensor([len(prompt) for prompt in prompts], device=device)
    texts: list[list[int]] = [[] for _ in prompts]
    live = list(range(len(prompts)))
    logits_BV = _prefill(model, prompts, cache, context)
    draws = Draws.of([sampling], device)
    for n in range(sampling.max_new_tokens):
        token_B = sample(logits_BV, noise_BN[:, n], draws)
        going = []  # rows of the batch that go on
        for row, token in enumerate(token_B.tolist()):
            if token != stop_id:
                texts[live[row]].append(token)
                going.append(row)
        if not going or n + 1 == sampling.max_new_tokens:
            break
        if len(going) < len(live):  # compute no sequence that has ended
            row_B = torch.tensor(going, device=device)
            cache.keep(row_B)
            token_B, length_B, noise_BN = token_B[row_B], length_B[row_B], noise_BN[row_B]
            live = [live[row] for row in going]
        # offsets stay on the CPU: the model reads them without a wait
        each_B1 = torch.arange(len(live) + 1, dtype=torch.int32)
        position_B = (length_B + n).int()
        logits_BV = model(token_B, position_B, each_B1, cache=cache, context=context).logits_TV
    return texts


def _prefill(
    model: CausalLM, prompts: Sequence[Sequence[int]], cache: KVCache, context: Context | None
) -> Tensor:
    """(B, V) logits after each prompt."""
    device = model.embed.weight.device
    offsets = [0, *accumulate(map(len, prompts))]
    ids_T = torch.tensor([i for prompt in prompts for i in prompt], device=device)
    position_T = torch.cat([torch.arange(len(p), dtype=torch.int32) for p in prompts]).to(device)
    offsets_B1 = torch.tensor(offsets, dtype=torch.int32)
    last_B = offsets_B1[1:].long().to(device) - 1
    out: LMOutput = model(
        ids_T, position_T, offsets_B1, cache=cache, context=context, asked_R=last_B
    )
    return out.logits_TV


def require_causal(model: CausalLM) -> None:
    """Raises NotCausalError: a layer's routing looks at later tokens."""
    for i, moe in enumerate(model.moes):
        if moe is not None and not moe.causal:
            raise NotCausalError(
                f"blocks.{i}.moe: policy={moe.config.policy} chooses by looking at later "
                "tokens, generate wants a causal model: train one with model.moe.policy=top_k"
            )


def check_prompts(prompts: Sequence[Sequence[int]], vocab: int) -> None:
    """Raises ConfigError: a prompt is empty or holds an id outside the vocabulary."""
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ConfigError(f"prompt {i} is empty: want at least one token, like a separator")
        unknown = [token for token in prompt if not 0 <= token < vocab]
        if unknown:
            raise ConfigError(
                f"prompt {i} holds token {unknown[0]}: want 0..{vocab - 1}; "
                "encode it with the model's own tokenizer"
            )
