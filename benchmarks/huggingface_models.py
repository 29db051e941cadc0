"""Whole models of transformers for `benchmarks.huggingface`: four layers, random weights."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LAYERS, VOCAB, CONTEXT = 4, 1024, 128


@dataclass(frozen=True, slots=True)
class Whole:
    """Attributes:
    switch: takes the name of an experts implementation.
    run: gives logits, (rows, V), one per sequence that decodes or per token.
    """

    switch: Callable[[str], None]
    run: Callable[[], Tensor]


def small_model(model: str, sizes: tuple[int, ...], *, decodes: bool, tokens: int) -> Whole:
    """A prefill of `tokens` tokens, or one more token for each of `tokens` sequences.

    Args:
        model: model_type of transformers.
        sizes: D, F, E, K.
    """
    import transformers

    D, F, E, K = sizes
    cuda = torch.cuda.is_available()
    heads = max(2, D // 128)
    config = transformers.AutoConfig.for_model(
        model, vocab_size=VOCAB, hidden_size=D, intermediate_size=F, moe_intermediate_size=F,
        num_hidden_layers=LAYERS, num_attention_heads=heads, num_key_value_heads=heads // 2,
        num_experts_per_tok=K, head_dim=D // heads, pad_token_id=None, bos_token_id=None,
        eos_token_id=None, **{"num_local_experts" if model == "mixtral" else "num_experts": E},
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda" if cuda else "cpu"):
        auto: Any = transformers.AutoModelForCausalLM
        made = auto.from_config(config, dtype=torch.bfloat16 if cuda else torch.float32).eval()
        batch = (tokens, CONTEXT) if decodes else (1, tokens)
        ids = torch.randint(VOCAB, batch)

    def switch(name: str) -> None:
        made.config._experts_implementation = name  # as set_experts_implementation, but in no time

    return Whole(switch, _decode(made, ids) if decodes else _all(made, ids))


def _all(model: Any, ids: Tensor) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with torch.no_grad():
            logits: Tensor = model(ids, use_cache=False).logits
        return logits.flatten(0, 1)

    return run


def _decode(model: Any, ids: Tensor) -> Callable[[], Tensor]:
    with torch.no_grad():
        cache = model(ids[:, :-1]).past_key_values

    def run() -> Tensor:
        with torch.no_grad():
            logits: Tensor = model(ids[:, -1:], past_key_values=cache).logits
        cache.crop(-1)  # every run decodes the same token
        return logits[:, -1]

    return run


def check(logits: Tensor, wanted: Tensor) -> float:
    """Relative error of the median row: in bf16 a few tokens may tie between experts."""
    logits, wanted = logits.double(), wanted.double()
    return float(((logits - wanted).norm(dim=-1) / wanted.norm(dim=-1)).median())
