"""What each rank of a serving test runs; importable by the worker processes."""

import torch.distributed as dist

from moe_router.config import ModelConfig, MoEConfig
from moe_router.dispatch import AllToAll, Local
from moe_router.models import CausalLM, Sampling, init_parameters
from moe_router.serving.decoder import Decoder
from moe_router.serving.requests import Request, Work
from moe_router.training.data import ByteTokenizer

TOKENIZER = ByteTokenizer()


def byte_model(
    std=8.0, routing=None, dim=16, kernels="auto", vocab=TOKENIZER.vocab, experts=6, **moe
):
    """As initialised by one seed, for any number of ranks; attention and router matter.

    Args:
        experts: 0 is a dense model.
    """
    config = ModelConfig(
        layers=3,
        dim=dim,
        heads=4,
        kv_heads=2,
        hidden=24,
        moe=MoEConfig(**{"experts": experts, "top_k": 2, "hidden": 8} | moe) if experts else None,
        routing=routing,
    )
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    dispatcher = AllToAll() if ranks > 1 else Local()
    model = CausalLM(config, vocab, dispatcher=dispatcher, kernels=kernels)
    init_parameters(model, seed=3)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data *= std
    return model


def request(number, text="ab", **sampling):
    return Request(number, tuple(text.encode()), Sampling(**{"max_new_tokens": 12} | sampling))


REQUESTS = [
    request(0, "The first", temperature=0.0),
    request(1, "a", temperature=1.2, seed=5),
    request(2, "a longer prompt than the others", temperature=0.9, top_k=7, max_new_tokens=5),
    request(3, "a", temperature=1.2, seed=6),
    request(4, "some words", temperature=1.0, top_p=0.7, max_new_tokens=20),
]


def drive(decoder, admitted, passes, read=1 << 30):
    """Tokens by request, when `admitted[n]` are admitted before pass n."""
    made = {}
    for n in range(passes):
        for event in decoder.step(Work(tuple(admitted.get(n, ())), read=read)):
            tokens = made.setdefault(event.id, [])
            if event.token is not None:
                tokens.append(event.token)
    return made


def two_ranks(rank, ranks, routing=None, read=1 << 30):
    """Requests dealt unevenly; rank 1 has none in its first passes and in its last."""
    decoder = Decoder(byte_model(routing=routing), TOKENIZER.document_id)
    first, second, third, fourth, fifth = REQUESTS
    admitted = [{0: [first], 3: [third], 4: [fourth]}, {2: [second, fifth]}][rank]
    return drive(decoder, admitted, 50, read)
