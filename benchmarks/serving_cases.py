"""What `benchmarks.serving` serves: shapes, random weights and prompts, and the least time."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from moe_router.config import ModelConfig, MoEConfig
from moe_router.models import CausalLM


@dataclass(frozen=True, slots=True)
class Case:
    """Attributes:
    new: tokens of an answer.
    """

    config: ModelConfig
    vocab: int
    streams: tuple[int, ...]
    prompt: int
    new: int


CASES = {
    "qwen3": Case(
        ModelConfig(
            layers=12, dim=2048, heads=32, kv_heads=4, head_dim=128, hidden=6144,
            rope_theta=1e6, norm_eps=1e-6, tie_embeddings=False,
            moe=MoEConfig(experts=128, top_k=8, hidden=768, balance_loss=0.0),
        ), 151_936, (1, 16, 64, 256), 512, 129,
    ),
    "tiny": Case(
        ModelConfig(
            layers=2, dim=64, heads=4, kv_heads=2, hidden=96, tie_embeddings=False,
            moe=MoEConfig(experts=8, top_k=2, hidden=32, balance_loss=0.0),
        ), 500, (1, 3), 20, 9,
    ),
    "http_tiny": Case(
        ModelConfig(
            layers=2, dim=64, heads=4, kv_heads=2, hidden=96, tie_embeddings=False,
            moe=MoEConfig(experts=8, top_k=2, hidden=32, balance_loss=0.0),
        ), 500, (16, 64), 20, 150,
    ),
    "http_middle": Case(
        ModelConfig(
            layers=6, dim=384, heads=6, kv_heads=2, hidden=1024, tie_embeddings=False,
            moe=MoEConfig(experts=16, top_k=2, hidden=512, balance_loss=0.0),
        ), 8_000, (16,), 64, 40,
    ),
}  # fmt: skip


class Words:
    """A tokenizer whose every token is a word."""

    def __init__(self, vocab: int) -> None:
        self.vocab, self.document_id = vocab, 0
        self.bytes_of = np.full(vocab, 4, np.int64)

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: Any) -> str:
        return "".join(f" {token}" for token in ids)


def new_model(case: Case) -> CausalLM:
    """Random weights, made where they stay."""
    cuda = torch.cuda.is_available()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if cuda else torch.float32)
    try:
        with torch.device("cuda" if cuda else "cpu"):
            return CausalLM(case.config, case.vocab).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(torch.float32)


def prompts_of(case: Case, streams: int) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(streams)
    ids = torch.randint(1, case.vocab, (streams, case.prompt), generator=generator)
    return [tuple(row) for row in ids.tolist()]


def least_ms(case: Case, streams: int, copy: float) -> float:
    """Milliseconds to read what a step must read, at `copy` GB/s; 0: no ceiling was measured."""
    config, moe = case.config, case.config.moe
    assert moe is not None
    if not copy:
        return 0.0
    D, width = config.dim, config.channels * config.heads
    kv_width = config.channels * config.kv_heads
    hit = moe.experts * (1 - (1 - moe.top_k / moe.experts) ** streams)
    layer = 2 * D * width + 2 * D * kv_width + D * moe.experts + hit * 3 * D * moe.hidden
    seen = streams * (case.prompt + case.new / 2) * 2 * kv_width
    return 2 * (config.layers * (layer + seen) + D * case.vocab) / copy / 1e6
