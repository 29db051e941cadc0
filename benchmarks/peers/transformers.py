"""transformers' experts, implementation grouped_mm."""

import importlib

import torch
from torch import Tensor, nn

from benchmarks.peers.base import Call, Layer, Peer

qwen = importlib.import_module("transformers.models.qwen3_moe.modeling_qwen3_moe")


def layer(layer: Layer, train: bool) -> Call:
    D, F = layer.down.shape[1:]
    config = importlib.import_module("transformers").Qwen3MoeConfig(
        hidden_size=D,
        moe_intermediate_size=F,
        num_experts=layer.experts,
        num_experts_per_tok=layer.ids_TK.size(1),
    )
    config._experts_implementation = "grouped_mm"
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


PEER = Peer("transformers", "transformers", layer)
