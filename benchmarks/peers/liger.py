"""Liger-Kernel's fused MoE."""

import importlib

from torch import Tensor

from benchmarks.peers.base import Call, Layer, Peer

fused_moe = importlib.import_module("liger_kernel.ops.fused_moe")


def layer(layer: Layer, train: bool) -> Call:
    x_TD, weight_TK, gate_up, down = leaves = layer.leaves(train)
    function = fused_moe.LigerFusedMoEFunction

    def run() -> Tensor:
        out: Tensor = function.apply(x_TD, gate_up, down, layer.ids_TK, weight_TK)
        return out

    return Call(run, leaves, sorts=True)


PEER = Peer("Liger", "liger-kernel", layer, graph="reads a count on the host")
