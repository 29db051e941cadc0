"""transformers' experts, by any of its implementations; in the kernels' table by grouped_mm."""

import importlib
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.peers.base import Call, Layer, Limited, Peer, Route

qwen = importlib.import_module("transformers.models.qwen3_moe.modeling_qwen3_moe")


def layer_by(implementation: str) -> Callable[[Layer, bool], Call]:
    """What makes a layer of a Qwen3-MoE whose experts are computed so."""
    return partial(_layer, implementation)


def _layer(implementation: str, layer: Layer, train: bool) -> Call:
    D, F = layer.down.shape[1:]
    config = importlib.import_module("transformers").Qwen3MoeConfig(
        hidden_size=D,
        moe_intermediate_size=F,
        num_experts=layer.experts,
        num_experts_per_tok=layer.ids_TK.size(1),
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        experts = qwen.Qwen3MoeExperts(config)
    x_TD, weight_TK, gate_up, down = layer.leaves(train)
    experts.gate_up_proj = nn.Parameter(gate_up, requires_grad=train)
    experts.down_proj = nn.Parameter(down, requires_grad=train)
    leaves = [x_TD, weight_TK, experts.gate_up_proj, experts.down_proj]
    ids_TK = layer.ids_TK.long()

    def run() -> Tensor:
        out: Tensor = experts(x_TD, ids_TK, weight_TK.to(x_TD.dtype))
        return out

    return Call(run, leaves, sorts=True)


def route_groups(of: Limited) -> Route:
    """The router of its DeepSeek-V3, after the matrix product; ids and weights, no Plan."""
    deepseek = importlib.import_module("transformers.models.deepseek_v3.modeling_deepseek_v3")
    E = of.logits.size(1)
    config = importlib.import_module("transformers").DeepseekV3Config(
        n_routed_experts=E, num_experts_per_tok=of.k, n_group=of.groups,
        topk_group=of.top_groups, norm_topk_prob=True, hidden_size=8, moe_intermediate_size=8,
    )  # fmt: skip
    with torch.device("meta"):
        moe = deepseek.DeepseekV3MoE(config)
    moe.gate.e_score_correction_bias = of.bias_E
    return lambda: moe.route_tokens_to_experts(of.logits)[0]


PEER = Peer("transformers", "transformers", layer_by("grouped_mm"), route_groups=route_groups)
