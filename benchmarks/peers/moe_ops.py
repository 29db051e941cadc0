"""moe-ops: permute, grouped GEMM, unpermute, in Triton."""

import importlib

from torch import Tensor

from benchmarks.peers.base import Call, Layer, Peer, Route, silu_times

ops = importlib.import_module("moe_ops")


def layer(layer: Layer, train: bool) -> Call:
    (T, K), E = layer.ids_TK.shape, layer.experts
    x_TD, weight_TK, gate_up, down = leaves = layer.leaves(train)

    def run() -> Tensor:
        rows_RD, row_map, offsets = ops.permute(x_TD, layer.ids_TK, 0, E)
        act_RF = silu_times(ops.grouped_gemm(rows_RD, gate_up, offsets))
        y_RD = ops.grouped_gemm(act_RF, down, offsets)
        out: Tensor = ops.unpermute(y_RD, row_map, weight_TK, T, K)
        return out

    return Call(run, leaves, sorts=True)


def permute(logits: Tensor, k: int, x_TD: Tensor) -> Route:
    def run() -> Tensor:
        _, ids_TK = ops.fused_topk_softmax(logits, k)
        ops.permute(x_TD, ids_TK, 0, logits.size(1))
        ids: Tensor = ids_TK
        return ids

    return run


PEER = Peer("moe-ops", "moe-ops", layer, permute=permute)
