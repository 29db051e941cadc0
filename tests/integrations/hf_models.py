"""Models of transformers with experts, of random weights and small enough for any machine."""

import torch
import transformers

MODELS = {
    "Mixtral": {},
    "Qwen3Moe": {"head_dim": 4, "decoder_sparse_step": 1, "mlp_only_layers": []},
    "Olmoe": {},
    "DeepseekV3": {
        "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1,
        "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
        "v_head_dim": 4, "num_key_value_heads": 4, "head_dim": 4,
    },
}  # fmt: skip


def small(kind, **more):
    """A model for causal LM of random weights, by the name of its config class."""
    sizes = {
        "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 8,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(**sizes | MODELS[kind] | more)
    torch.manual_seed(0)
    return getattr(transformers, f"{kind}ForCausalLM")(config)


def by_both(model, use):
    """What `use` makes of a model with our experts, and of it with eager ones."""
    made = []
    for name in ("moe_router", "eager"):
        model.set_experts_implementation(name)
        torch.manual_seed(1)
        made.append(use(model))
    return made
