"""This project's kernels."""

import torch
from torch import Tensor

from benchmarks.peers.base import Call, Layer, Limited, Peer, Route
from benchmarks.timing import Run
from moe_router import MoE, MoEConfig
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


def route_groups(of: Limited, kernels: str = "auto") -> Route:
    def run() -> Tensor:
        made = gate(
            of.logits, of.k, experts=of.logits.size(1), score="sigmoid", bias_E=of.bias_E,
            expert_groups=of.groups, top_groups=of.top_groups, kernels=kernels,
        )  # fmt: skip
        return made.raw_TK

    return run


def whole_layer(layer: Layer) -> Run:
    """Router, Plan and experts of one MoE layer, from x alone."""
    E, D, hidden = layer.down.shape
    config = MoEConfig(experts=E, top_k=layer.ids_TK.size(1), hidden=hidden)
    with torch.device("meta"):
        moe = MoE(D, config)
    moe.router.score.weight = torch.nn.Parameter(torch.randn(E, D, device=layer.x_TD.device))
    moe.router.bias_E = torch.zeros(E, device=layer.x_TD.device)
    moe.experts.gate_up = torch.nn.Parameter(layer.gate_up)
    moe.experts.down = torch.nn.Parameter(layer.down)
    moe.eval().requires_grad_(False)
    return lambda: moe(layer.x_TD[None]).delta_TD


def check_route(logits: Tensor, k: int, x_TD: Tensor | None) -> bool:
    """Ids, Plan and rows bit by bit as the reference's, weights to fp32's rounding."""
    ours, wanted = (gate(logits, k, experts=logits.size(1), kernels=which) for which in KERNELS)
    assert ours.plan is not None and wanted.plan is not None
    same = all(torch.equal(one, part) for one, part in zip(ours.plan, wanted.plan, strict=True))
    close = torch.allclose(ours.weight_TK, wanted.weight_TK, rtol=1e-5, atol=1e-7)
    moved = x_TD is None or torch.equal(move_rows(x_TD, ours.plan[3]), x_TD[ours.plan[0].long()])
    return same and close and moved and torch.equal(ours.raw_TK, wanted.raw_TK)


PEER = Peer(
    "moe_router", "moe_router", layer, route=route, permute=permute, route_groups=route_groups
)
