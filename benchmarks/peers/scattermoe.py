"""ScatterMoE, from its public repository."""

import importlib

import torch
from torch import Tensor

from benchmarks.peers.base import Call, Layer, Peer, silu_times

module = importlib.import_module("scattermoe")


def layer(layer: Layer, train: bool) -> Call:
    K, E = layer.ids_TK.size(1), layer.experts
    x_TD, weight_TK, gate_up, down = leaves = layer.leaves(train)
    flat = layer.ids_TK.flatten().long()
    sorted_ids, order = flat.sort()
    ends = torch.bincount(flat, minlength=E).cumsum(0)

    def run() -> Tensor:
        up = module.parallel_linear(x_TD, gate_up.mT, K, sorted_ids, order, ends, grouped_out=True)
        out: Tensor = module.parallel_linear(
            silu_times(up), down.mT, 1, sorted_ids, order, ends,
            gates=weight_TK.to(x_TD.dtype), grouped_in=True,
        )  # fmt: skip
        return out

    return Call(run, leaves)


PEER = Peer("ScatterMoE", "scattermoe", layer)
