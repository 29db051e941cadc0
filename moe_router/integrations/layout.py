"""Our causal LM as Hugging Face lays out Llama (dense) and Mixtral (experts): files, no library.

The blocks are the same mathematics: RMSNorm before each half, rotary positions in half heads,
grouped queries, SwiGLU, softmax top-k whose weights sum to 1. Only names differ.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from moe_router.config import ModelConfig, MoEConfig, require
from moe_router.errors import ConfigError
from moe_router.integrations.layout_files import EMBEDDINGS, HEAD, WEIGHTS, Files
from moe_router.models import CausalLM

CONFIG, TOKENIZER = "config.json", "tokenizer.json"
_ATTENTION = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}


def names(config: ModelConfig) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Each of our tensors by its global name, and theirs whose rows it stacks."""
    yield "embed.weight", (EMBEDDINGS,)
    for i in range(config.layers):
        ours, theirs = f"blocks.{i}", f"model.layers.{i}"
        yield f"{ours}.attention_norm.weight", (f"{theirs}.input_layernorm.weight",)
        for one, other in _ATTENTION.items():
            yield f"{ours}.attention.{one}.weight", (f"{theirs}.self_attn.{other}.weight",)
        yield f"{ours}.mlp_norm.weight", (f"{theirs}.post_attention_layernorm.weight",)
        if config.moe is None:
            mlp = f"{theirs}.mlp"
            gate_up = f"{mlp}.gate_proj.weight", f"{mlp}.up_proj.weight"
            yield f"{ours}.mlp.gate_up.weight", gate_up
            yield f"{ours}.mlp.down.weight", (f"{mlp}.down_proj.weight",)
            continue
        moe = f"{theirs}.block_sparse_moe"
        yield f"{ours}.moe.router.score.weight", (f"{moe}.gate.weight",)
        for e in range(config.moe.experts):
            expert = f"{moe}.experts.{e}"
            gate_up = f"{expert}.w1.weight", f"{expert}.w3.weight"
            yield f"{ours}.moe.experts.{e}.gate_up", gate_up
            yield f"{ours}.moe.experts.{e}.down", (f"{expert}.w2.weight",)
    yield "norm.weight", ("model.norm.weight",)
    if not config.tie_embeddings:
        yield "head.weight", (HEAD,)


def to_hf(config: ModelConfig, vocab: int, end: int | None) -> dict[str, Any]:
    """Their config.json.

    Args:
        end: the token that separates documents.

    Raises:
        ConfigError: their models do not compute what ours does.
    """
    _require_alike(config)
    moe = config.moe
    out: dict[str, Any] = {
        "architectures": ["MixtralForCausalLM" if moe else "LlamaForCausalLM"],
        "model_type": "mixtral" if moe else "llama",
        "vocab_size": vocab,
        "hidden_size": config.dim,
        "intermediate_size": moe.hidden if moe else config.hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.channels,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "max_position_embeddings": 131072,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": end,
        "eos_token_id": end,
        "dtype": "float32",
    }
    if moe is not None:
        out |= {"num_local_experts": moe.experts, "num_experts_per_tok": moe.top_k}
        out["sliding_window"] = None
    return out


def from_hf(folder: Path) -> tuple[ModelConfig, int]:
    """The model that a folder's config.json describes, and its vocabulary.

    Raises:
        ConfigError: no such file, another kind of model, or one that ours does not compute.
    """
    path = folder / CONFIG
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {error}; want the folder of a transformers model") from None
    kind = found.get("model_type")
    known = kind in ("llama", "mixtral")
    require(known, f"{path}: model_type", kind, "llama or mixtral: their blocks are ours")
    heads = found["num_attention_heads"]
    own = found.get("head_dim") or found["hidden_size"] // heads
    rope = found.get("rope_parameters") or found.get("rope_scaling") or {}
    for key, value, wanted in (
        ("hidden_act", found.get("hidden_act", "silu"), "silu"),
        ("attention_bias", bool(found.get("attention_bias")), False),
        ("mlp_bias", bool(found.get("mlp_bias")), False),
        ("sliding_window", found.get("sliding_window"), None),
        ("rope_type", rope.get("rope_type", "default"), "default"),
    ):  # fmt: skip
        require(value == wanted, f"{path}: {key}", value, f"{wanted}: ours has no other")
    moe = None
    if kind == "mixtral":
        moe = MoEConfig(
            experts=found["num_local_experts"],
            top_k=found["num_experts_per_tok"],
            hidden=found["intermediate_size"],
        )
    model = ModelConfig(
        layers=found["num_hidden_layers"],
        dim=found["hidden_size"],
        heads=heads,
        kv_heads=found.get("num_key_value_heads", heads),
        head_dim=None if own == found["hidden_size"] // heads else own,
        hidden=found["intermediate_size"],
        rope_theta=float(rope.get("rope_theta") or found.get("rope_theta", 10000.0)),
        norm_eps=found["rms_norm_eps"],
        tie_embeddings=bool(found.get("tie_word_embeddings", False)),
        moe=moe,
    )
    return model, found["vocab_size"]


def write_hf(
    folder: Path, model: CausalLM, weights: dict[str, Tensor], end: int | None, tokenizer: str
) -> None:
    """A folder that `from_pretrained` reads.

    Args:
        weights: of all experts, by global name.
        tokenizer: `bytes`, or the path of a tokenizer.json, which is copied.

    Raises:
        ConfigError: their models do not compute what ours does, or the folder is not empty.
    """
    about = to_hf(model.config, model.vocab, end)
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder}: is not empty; want a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    out = {}
    for ours, theirs in names(model.config):
        for name, part in zip(theirs, weights[ours].chunk(len(theirs)), strict=True):
            out[name] = part.detach().cpu().clone(memory_format=torch.contiguous_format)
    save_file(out, folder / WEIGHTS, metadata={"format": "pt"})
    if tokenizer != "bytes":
        shutil.copyfile(tokenizer, folder / TOKENIZER)
    (folder / CONFIG).write_text(json.dumps(about, indent=2) + "\n", "utf-8")


def read_hf(folder: Path, config: ModelConfig, weights: dict[str, Tensor]) -> None:
    """Fill the tensors of `weights` in place; of the files only what they need is read.

    A dense checkpoint fills a model with experts too: each expert begins as the dense layer, and
    routers stay as they are (sparse upcycling, arXiv:2212.05055).

    Args:
        config: of the model that is filled.
        weights: of this rank, by global name.

    Raises:
        CheckpointError: a tensor is missing, of another shape, or damaged.
    """
    saved, _ = from_hf(folder)
    sources = dict(names(config))
    if saved.moe is None and config.moe is not None:
        sources = _upcycled(config, saved)
    places: dict[str, list[Tensor]] = {}
    for ours, tensor in weights.items():
        theirs = sources.get(ours)
        if theirs is None:
            continue  # a router that they do not have
        for name, part in zip(theirs, tensor.chunk(len(theirs)), strict=True):
            places.setdefault(name, []).append(part)
    with Files(folder) as files:
        for name, parts in places.items():
            files.copy_into(name, parts)


def _upcycled(config: ModelConfig, saved: ModelConfig) -> dict[str, tuple[str, ...]]:
    """The dense layer's tensors as those of each expert."""
    dense = dict(names(saved))
    assert config.moe is not None
    out = {}
    for ours, theirs in names(config):
        block, _, rest = ours.partition(".moe.")
        if not rest:
            out[ours] = theirs
        elif rest.startswith("experts."):
            out[ours] = dense[f"{block}.mlp.{rest.rpartition('.')[2]}.weight"]
    return out


def _require_alike(config: ModelConfig) -> None:
    """Raises ConfigError: no layout of theirs computes this."""
    moe = config.moe
    for key, value, wanted in (
        ("kind", config.kind, "causal_lm"),
        ("loops", config.loops, 1),
        ("routing", config.routing and config.routing.kind, None),
        ("attention", config.attention and config.attention.kind, None),
        *(
            (f"moe.{key}", getattr(moe, key), wanted)
            for key, wanted in (
                ("policy", "top_k"), ("score", "softmax"), ("router", "linear"),
                ("renormalise", True), ("scale", 1.0), ("straight_through", False),
                ("null_experts", 0), ("expert_groups", 1), ("bias_rate", 0.0),
                ("shared_hidden", 0), ("every", 1), ("first", 0),
            )
            if moe is not None
        ),
    ):  # fmt: skip
        require(value == wanted, f"model.{key}", value, f"{wanted}: transformers' has no other")
