"""This project's kernels."""

import torch
from torch import Tensor

from benchmarks.peers.base import Call, Layer, Peer, Route
from moe_router_kernels import fused, reference
from moe_router_kernels.expert_mlp import expert_mlp


def layer(layer: Layer, train: bool) -> Call:
    plan = reference.plan(layer.ids_TK, layer.experts)
    x_TD, weight_TK, gate_up, down = leaves = layer.leaves(train)
    return Call(lambda: expert_mlp(x_TD, weight_TK, gate_up, down, *plan), leaves)


def route(logits: Tensor, k: int) -> Route:
    return lambda: fused.gate_and_plan(logits, k, experts=logits.size(1))["target_TK"]


def permute(logits: Tensor, k: int, x_TD: Tensor) -> Route:
    def run() -> Tensor:
        return fused.gate_and_plan(logits, k, experts=logits.size(1), x_TD=x_TD)["target_TK"]

    return run


def check_route(logits: Tensor, k: int, x_TD: Tensor | None) -> bool:
    """Ids, Plan and rows bit by bit as the reference's, weights to fp32's rounding."""
    E = logits.size(1)
    out = fused.gate_and_plan(logits, k, experts=E, x_TD=x_TD)
    score_TE = reference.score(logits, "softmax")
    ids_TK = reference.top_k(score_TE, k)
    plan = reference.plan(ids_TK, E)
    names = ("src_R", "choice_R", "offsets_G1", "row_TK")
    same = all(torch.equal(out[name], part) for name, part in zip(names, plan, strict=True))
    weight_TK = reference.choice_weights(score_TE, ids_TK, True)
    close = torch.allclose(out["weight_TK"], weight_TK, rtol=1e-5, atol=1e-7)
    moved = x_TD is None or torch.equal(out["rows_RD"], x_TD[plan[0].long()])
    return same and close and moved and torch.equal(out["target_TK"], ids_TK)


PEER = Peer("moe_router", "moe_router", layer, route=route, permute=permute)
