"""This project's kernels."""

import torch
from torch import Tensor

from benchmarks.peers.base import Call, Layer, Peer, Route
from moe_router_kernels import expert_mlp, gate, reference
from moe_router_kernels.permute import move_rows

KERNELS = ("triton", "reference")


def layer(layer: Layer, train: bool) -> Call:
    plan = reference.plan(layer.ids_TK, layer.experts)
    x_TD, weight_TK, gate_up, down = leaves = layer.leaves(train)
    return Call(lambda: expert_mlp(x_TD, weight_TK, gate_up, down, *plan), leaves)


def route(logits: Tensor, k: int) -> Route:
    return lambda: gate(logits, k, experts=logits.size(1)).raw_TK


def permute(logits: Tensor, k: int, x_TD: Tensor) -> Route:
    def run() -> Tensor:
        made = gate(logits, k, experts=logits.size(1))
        assert made.plan is not None
        move_rows(x_TD, made.plan[3])
        return made.raw_TK

    return run


def check_route(logits: Tensor, k: int, x_TD: Tensor | None) -> bool:
    """Ids, Plan and rows bit by bit as the reference's, weights to fp32's rounding."""
    ours, wanted = (gate(logits, k, experts=logits.size(1), kernels=which) for which in KERNELS)
    assert ours.plan is not None and wanted.plan is not None
    same = all(torch.equal(one, part) for one, part in zip(ours.plan, wanted.plan, strict=True))
    close = torch.allclose(ours.weight_TK, wanted.weight_TK, rtol=1e-5, atol=1e-7)
    moved = x_TD is None or torch.equal(move_rows(x_TD, ours.plan[3]), x_TD[ours.plan[0].long()])
    return same and close and moved and torch.equal(ours.raw_TK, wanted.raw_TK)


PEER = Peer("moe_router", "moe_router", layer, route=route, permute=permute)
