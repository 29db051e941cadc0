"""What each rank of a dispatch test runs; importable by the worker processes."""

import dataclasses
import itertools

import torch

from moe_router.config import MoEConfig
from moe_router.dispatch import AllToAll
from moe_router.layers.moe import MoE
from moe_router.placement import Placement
from moe_router.types import Tokens

DIM = 8


def batch(T, seed=0):
    """(T, D) tokens and the gradient they will receive; sequences of 5, the last one shorter."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, T, DIM, generator=generator)


def packed(x_TD):
    position_T = torch.arange(len(x_TD), dtype=torch.int32) % 5
    offsets = torch.tensor([*range(0, len(x_TD), 5), len(x_TD)], dtype=torch.int32)
    return Tokens(x_TD, position_T, offsets)


def whole_layer(config):
    torch.manual_seed(1)
    return MoE(DIM, config)


def shard(layer, placement, rank):
    """The layer of one rank: same router, its slice of the experts."""
    ours = MoE(DIM, layer.config, dispatcher=AllToAll(), placement=placement)
    mine = list(placement.experts_of_rank[rank])
    state = layer.state_dict()
    for name in ("experts.gate_up", "experts.down"):
        state[name] = state[name][mine]
    ours.load_state_dict(state)
    return ours


def gradient(parameter):
    """A rank without experts has nothing to differentiate."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def forward_backward(layer, tokens, grad_TD):
    x_TD = tokens.x_TD.clone().requires_grad_()
    routed = layer(dataclasses.replace(tokens, x_TD=x_TD))
    loss = (routed.delta_TD * grad_TD).sum() + layer.aux_loss(routed.choice)
    loss.backward()
    return {
        "delta": routed.delta_TD.detach(),
        "x": x_TD.grad,
        "router": layer.router.score.weight.grad,
        "gate_up": gradient(layer.experts.gate_up),
        "down": gradient(layer.experts.down),
        "loss": layer.aux_loss(routed.choice).detach(),
        "kept": (routed.plan.row_TK >= 0),
    }


def run_shard(rank, ranks, variant, placement, bounds):
    """Forward and backward of this rank's slice of the batch."""
    config = MoEConfig(**variant)
    layer = shard(whole_layer(config), Placement(placement), rank)
    x_TD, grad_TD = batch(bounds[-1])
    mine = slice(bounds[rank], bounds[rank + 1])
    return forward_backward(layer, packed(x_TD[mine]), grad_TD[mine])


def run_double(rank, ranks, variant):
    """The most that an fp64 layer of several ranks differs from one of one rank."""
    whole = whole_layer(MoEConfig(**variant))
    ours = shard(whole, Placement.contiguous(variant["experts"], ranks), rank).double()
    x_TD = batch(7)[rank].double()
    return float((ours(x_TD).delta_TD - whole.double()(x_TD).delta_TD).abs().max())


def run_without_gradient_to_the_rows(rank, ranks, variant, placement):
    """Only experts learn: neither the tokens nor the router want a gradient."""
    layer = shard(whole_layer(MoEConfig(**variant, frozen=True)), Placement(placement), rank)
    layer(batch(7)[rank]).delta_TD.sum().backward()
    return layer.experts.down.grad


def run_whole(variant, bounds):
    """The same batch on one rank; sequences cut where the ranks cut them."""
    x_TD, grad_TD = batch(bounds[-1])
    parts = [packed(x_TD[a:b]) for a, b in itertools.pairwise(bounds)]
    position_T = torch.cat([part.position_T for part in parts])
    starts = [part.offsets_B1[:-1] + a for part, a in zip(parts, bounds, strict=False)]
    offsets = torch.cat([*starts, torch.tensor([bounds[-1]])]).int()
    return forward_backward(
        whole_layer(MoEConfig(**variant)), Tokens(x_TD, position_T, offsets), grad_TD
    )
