"""What a client asks, as the requests that ranks take; refused where it cannot be met."""

import secrets

from moe_router.config import ServeConfig, require
from moe_router.models import Sampling
from moe_router.models.generate import check_prompts
from moe_router.serving.requests import Ask, Request
from moe_router.training.data import Tokenizer


def requests_of(
    ask: Ask, tokenizer: Tokenizer, defaults: ServeConfig, first: int, shift: float
) -> list[Request]:
    """One for each prompt.

    Args:
        defaults: for what is left out.
        first: id of the first; the others follow.
        shift: what its compute budget comes to.

    Raises:
        ConfigError: it cannot be met as it is.
    """
    none = ask.max_tokens == 0
    require(not none or ask.echo, "max_tokens", 0, "1 or more, or echo: true")
    require(all(ask.stop), "stop", list(ask.stop), "texts that are not empty")
    document = tokenizer.document_id
    prompts = [
        (document, *tokenizer.encode(prompt)) if isinstance(prompt, str) else prompt
        for prompt in ask.prompts
    ]
    require(bool(prompts), "prompt", "nothing", "at least one prompt")
    check_prompts(prompts, tokenizer.vocab)
    return [
        Request(
            first + i,
            prompt,
            _sampling(ask, defaults),
            trace=ask.trace,
            logprobs=ask.logprobs,
            echo=ask.echo,
            reads_only=none,
            shift=shift,
        )
        for i, prompt in enumerate(prompts)
    ]


def _sampling(ask: Ask, ours: ServeConfig) -> Sampling:
    return Sampling(
        # 0 reads the prompt alone, and then nothing is drawn
        max_new_tokens=ours.max_new_tokens if ask.max_tokens is None else ask.max_tokens or 1,
        temperature=ours.temperature if ask.temperature is None else ask.temperature,
        top_k=ours.top_k if ask.top_k is None else ask.top_k,
        top_p=ours.top_p if ask.top_p is None else ask.top_p,
        seed=secrets.randbits(31) if ask.seed is None else ask.seed,
    )
