"""transformers' continuous batching beside our engine, at the same shapes; else what was measured
of it before."""

import time
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.contest import tell, why
from moe_router.config import ModelConfig

NAME = "transformers continuous batching"
# decode tokens/s of transformers 5.17 (grouped_mm, paged SDPA) by streams, on one H100, at these
# shapes: quoted from the issue that set the goals
QUOTED = {1: 12.0, 16: 146.0, 64: 587.0, 256: 1065.0}


def measure(config: ModelConfig, vocab: int, prompts: Sequence[Sequence[int]], new: int) -> float:
    """Decode tokens/s of streams that begin together, from the first token of the last of them."""
    import transformers

    model = _model(config, vocab)
    settings = transformers.GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    inputs = [list(prompt) for prompt in prompts]
    began = time.time()
    results = model.generate_batch(
        inputs=inputs, generation_config=settings, record_timestamps=True, progress_bar=False
    )
    took = time.time() - began
    stamps = [list(result.timestamps or []) for result in results.values()]
    made = sum(len(result.generated_tokens) for result in results.values())
    if made < len(inputs) * new:
        raise RuntimeError(f"{made} of {len(inputs) * new} tokens came in {took:.0f} s")
    if not all(stamps):
        return made / took
    first, last = max(times[0] for times in stamps), min(times[-1] for times in stamps)
    during = sum(first < at <= last for times in stamps for at in times)
    return float(during / (last - first))


def _model(config: ModelConfig, vocab: int) -> Any:
    """Random weights, made on the device."""
    import transformers

    assert config.moe is not None
    theirs = transformers.AutoConfig.for_model(
        "qwen3_moe", vocab_size=vocab, hidden_size=config.dim, head_dim=config.channels,
        num_hidden_layers=config.layers, num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads, intermediate_size=config.hidden,
        moe_intermediate_size=config.moe.hidden, num_experts=config.moe.experts,
        num_experts_per_tok=config.moe.top_k, norm_topk_prob=True, tie_word_embeddings=False,
        pad_token_id=None, bos_token_id=None, eos_token_id=None, max_position_embeddings=4096,
    )  # fmt: skip
    auto: Any = transformers.AutoModelForCausalLM
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        made = auto.from_config(theirs, dtype=torch.bfloat16, attn_implementation="sdpa")
    return made.eval()


def beside(
    config: ModelConfig, vocab: int, prompts: Sequence[Sequence[int]], new: int, seconds: float
) -> dict[str, Any]:
    """The peer's part of a row: measured if there is time, else quoted, and why."""
    streams, reason = len(prompts), ""
    quoted = QUOTED.get(streams)
    # its start and its prompts take a while, too
    if quoted is None or 30 + new * streams / quoted > seconds:
        reason = "no time left"
    else:
        tell(f"{NAME}: {streams} streams")
        try:
            value = round(measure(config, vocab, prompts, new), 1)
            return {NAME: {"value": value, "quoted": False}}
        except Exception as problem:  # whatever a peer raises is its line in the table
            reason = why(problem)
            tell(f"{NAME}: {reason}")
    if quoted is None:
        return {NAME: {"reason": reason}}
    return {NAME: {"value": quoted, "quoted": True, "reason": reason}}
