"""Small models and packed batches for the tests of models."""

from functools import partial

import torch

from moe_router.config import ModelConfig, MoEConfig
from moe_router.models import CausalLM, TextClassifier, init_parameters

VOCAB = 23


def small_model(moe=None, *, recompute=False, std=8.0, classes=0, vocab=VOCAB, **model):
    """Weights are large enough for attention and router to matter; `moe` overrides a top-2 MoE.
    A classifier if there are classes."""
    routed = None if moe is None else MoEConfig(**{"experts": 6, "top_k": 2, "hidden": 8} | moe)
    kind = "encoder" if classes else "causal_lm"
    sizes = {"layers": 3, "dim": 16, "heads": 4, "kv_heads": 2, "hidden": 24, "moe": routed}
    config = ModelConfig(kind=kind, **sizes | model)
    make = partial(TextClassifier, classes=classes) if classes else CausalLM
    made = make(config, vocab, activation_checkpointing=recompute)
    init_parameters(made, seed=3)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter *= std
    return made


def packed(lengths, seed=0, vocab=VOCAB):
    """ids_T, position_T, offsets_B1 of random sequences of these lengths, at most `vocab`.

    No id comes twice in a sequence: equal tokens tie, and the last bit of a product decides.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randperm(vocab, generator=generator)[:n] for n in lengths]
    ids_T = torch.cat([torch.empty(0, dtype=torch.int64), *drawn])
    position_T = torch.cat([torch.arange(n, dtype=torch.int32) for n in [0, *lengths]])
    offsets_B1 = torch.tensor([0, *lengths]).cumsum(0).int()
    return ids_T, position_T, offsets_B1
