"""torch's grouped_mm the way torchtitan uses it: sort, gather, two grouped GEMMs, scatter."""

import torch
from torch import Tensor

from benchmarks.peers.base import Call, Layer, Peer, Route, silu_times


def _order(ids_TK: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    flat = ids_TK.flatten()
    load = torch.histc(flat.int(), bins=experts, min=0, max=experts - 1)
    return flat.argsort(stable=True), load.cumsum(0, dtype=torch.int32)


def _top_k(logits: Tensor, k: int) -> Tensor:
    weight_TK, ids_TK = logits.softmax(1).topk(k, 1)
    weight_TK / weight_TK.sum(1, keepdim=True)
    return ids_TK


def layer(layer: Layer, train: bool) -> Call:
    T, K = layer.ids_TK.shape
    x_TD, weight_TK, gate_up, down = leaves = layer.leaves(train)
    mm = torch.nn.functional.grouped_mm

    def run() -> Tensor:
        order, ends = _order(layer.ids_TK, layer.experts)
        act_RF = silu_times(mm(x_TD[order // K], gate_up.mT, offs=ends))
        y_RD = mm(act_RF, down.mT, offs=ends)
        y_TKD = torch.zeros_like(y_RD).index_copy(0, order, y_RD).view(T, K, -1)
        return torch.bmm(weight_TK.to(y_RD.dtype)[:, None], y_TKD)[:, 0]

    return Call(run, leaves, sorts=True)


def route(logits: Tensor, k: int) -> Route:
    def run() -> Tensor:
        ids_TK = _top_k(logits, k)
        _order(ids_TK, logits.size(1))
        return ids_TK

    return run


def permute(logits: Tensor, k: int, x_TD: Tensor) -> Route:
    def run() -> Tensor:
        ids_TK = _top_k(logits, k)
        x_TD[_order(ids_TK, logits.size(1))[0] // k]
        return ids_TK

    return run


PEER = Peer("torch grouped_mm", "torch", layer, route=route, permute=permute)
