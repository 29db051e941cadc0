"""What each rank of a dispatch test runs; importable by the worker processes."""

import dataclasses
import itertools

import torch

from moe_router.config import MoEConfig
from moe_router.dispatch import (
    AllToAll,
    GatherScatter,
    Local,
    Padded,
    PeerMemory,
    exchange,
    gather_scatter,
)
from moe_router.dispatch.peer_memory import PeerMover
from moe_router.layers.experts import Experts
from moe_router.layers.moe import MoE
from moe_router.placement import Placement
from moe_router.routing.plan import plan_from_ids
from moe_router.types import Choice, Tokens

DIM = 8
TRANSPORTS = {
    "all_to_all": lambda tokens, factor: AllToAll(),
    "padded": lambda tokens, factor: Padded(tokens, factor=factor),
    "gather_scatter": lambda tokens, factor: GatherScatter(tokens, factor=factor),
    "peer_memory": lambda tokens, factor: PeerMemory(tokens, factor=factor),
}


def transport(name, bounds, factor=1e3):
    """Bounds that hold whatever comes, unless a factor is given."""
    most = max(b - a for a, b in itertools.pairwise(bounds))
    return TRANSPORTS[name](most, factor)


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


def shard(layer, placement, rank, dispatcher):
    """The layer of one rank: same router, its slice of the experts."""
    ours = MoE(layer.dim, layer.config, dispatcher=dispatcher, placement=placement)
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


def run_shard(rank, ranks, name, variant, placement, bounds):
    """Forward and backward of this rank's slice of the batch."""
    whole = whole_layer(MoEConfig(**variant))
    layer = shard(whole, Placement(placement), rank, transport(name, bounds))
    x_TD, grad_TD = batch(bounds[-1])
    mine = slice(bounds[rank], bounds[rank + 1])
    return forward_backward(layer, packed(x_TD[mine]), grad_TD[mine])


def run_double(rank, ranks, name, variant):
    """The most that an fp64 layer of several ranks differs from one of one rank."""
    whole = whole_layer(MoEConfig(**variant))
    placement = Placement.contiguous(variant["experts"], ranks)
    ours = shard(whole, placement, rank, transport(name, (0, 7))).double()
    x_TD = batch(7)[rank].double()
    return float((ours(x_TD).delta_TD - whole.double()(x_TD).delta_TD).abs().max())


def run_without_gradient_to_the_rows(rank, ranks, name, variant, placement):
    """Only experts learn: neither the tokens nor the router want a gradient."""
    whole = whole_layer(MoEConfig(**variant, frozen=True))
    layer = shard(whole, Placement(placement), rank, transport(name, (0, 7)))
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


def routed(name, T, experts, top_k, held=(), seed=0):
    """(T, K) ids of a named routing, each token's distinct, and (T, K) weights.

    Args:
        held: experts of the hot rank, in `hot_rank`.
    """
    generator = torch.Generator().manual_seed(seed)
    popularity = {
        "uniform": torch.ones(experts),
        "zipf": 1 / torch.arange(1.0, experts + 1),
        "hot_expert": torch.tensor([1e6] + [1.0] * (experts - 1)),
        "hot_rank": torch.tensor([1e6 if e in held else 1.0 for e in range(experts)]),
        "empty_expert": torch.tensor([0.0] + [1.0] * (experts - 1)),
        "nobody": torch.ones(experts),
    }[name]
    if T == 0:
        return torch.zeros(0, top_k, dtype=torch.int32), torch.zeros(0, top_k)
    target_TK = torch.multinomial(popularity.expand(T, -1), top_k, generator=generator).int()
    weight_TK = torch.rand(T, top_k, generator=generator)
    if name == "nobody":
        return torch.full_like(target_TK, -1), torch.zeros_like(weight_TK)
    dropped_TK = torch.rand(T, top_k, generator=generator) < 0.1  # a null expert
    return target_TK.masked_fill(dropped_TK, -1), weight_TK.masked_fill(dropped_TK, 0.0)


def move(dispatcher, experts, placement, inputs, dtype, device="cpu"):
    """One forward and backward of given choices: results, gradients, and the flag.

    Args:
        inputs: x_TD, grad_TD, target_TK, weight_TK.
    """
    experts = experts.to(device)
    x_TD, grad_TD, target_TK, weight_TK = (t.to(device) for t in inputs)
    x_TD, weight_TK = (t.to(dtype).requires_grad_() for t in (x_TD, weight_TK))
    plan = plan_from_ids(target_TK, placement.experts)
    choice = Choice(target_TK, weight_TK)
    received = dispatcher.dispatch(x_TD, choice, plan, placement)
    y_ND = experts(received.x_ND, received.choice, received.plan)
    out_TD = dispatcher.combine(y_ND, received)
    out_TD.backward(grad_TD.to(dtype))
    found = {
        "out": out_TD.detach(),
        "x": x_TD.grad,
        "weight": weight_TK.grad,
        "gate_up": gradient(experts.gate_up),
        "down": gradient(experts.down),
    }
    return {name: tensor.cpu() for name, tensor in found.items()} | {
        "overflow": received.overflow is not None and bool(received.overflow),
    }


def drawn(routing, placement, bounds, top_k):
    """x, its gradient, and the choices, of all ranks together."""
    ids_W = placement.experts_of_rank
    args = (bounds[-1], placement.experts, top_k, ids_W[-1])
    return (*batch(bounds[-1]), *routed(routing, *args))


def experts_of(placement, ids, dtype):
    torch.manual_seed(2)
    whole = Experts(placement.experts, DIM, 12, "reference").to(dtype)
    part = Experts(len(ids), DIM, 12, "reference").to(dtype)
    for ours, all_of_them in zip(part.parameters(), whole.parameters(), strict=True):
        ours.data.copy_(all_of_them.data[list(ids)])
    return part


def move_whole(routing, placement, bounds, top_k, dtype):
    placement = Placement(placement)
    experts = experts_of(placement, range(placement.experts), dtype)
    one = Placement.contiguous(placement.experts, 1)
    return move(Local(), experts, one, drawn(routing, placement, bounds, top_k), dtype)


def move_part(
    rank, ranks, name, routing, placement, bounds, top_k, dtype, factor=1e3, device="cpu"
):
    placement = Placement(placement)
    mine = slice(bounds[rank], bounds[rank + 1])
    inputs = [t[mine] for t in drawn(routing, placement, bounds, top_k)]
    experts = experts_of(placement, placement.experts_of_rank[rank], dtype)
    return move(transport(name, bounds, factor), experts, placement, inputs, dtype, device)


def move_parts(rank, ranks, name, cases, device="cpu"):
    return [move_part(rank, ranks, name, *case, device=device) for case in cases]


STARTS = {
    "all_to_all": (exchange, ["start_exchange"]),
    "padded": (exchange, ["start_exchange"]),
    "gather_scatter": (gather_scatter, ["start_all_gather", "start_reduce_scatter"]),
    "peer_memory": (PeerMover, ["_start_out", "_start_home"]),
}


def run_with_log(rank, ranks, name, variant):
    """What a layer with a shared expert does, in order, forward and backward."""
    layer = shard(
        whole_layer(MoEConfig(**variant)), Placement.contiguous(variant["experts"], ranks), rank,
        transport(name, (0, 7)),
    )  # fmt: skip
    log, (module, names) = [], STARTS[name]

    def logged(real):
        def start(*args):
            log.append("rows leave")
            out, wait = real(*args)
            return out, lambda: (wait(), log.append("rows are waited for"))

        return start

    layer.shared.register_forward_hook(lambda *_: log.append("shared expert"))
    layer.shared.register_full_backward_hook(lambda *_: log.append("shared expert, backward"))
    x_TD = batch(7)[0].requires_grad_()
    real = {each: getattr(module, each) for each in names}
    try:
        for each in names:
            setattr(module, each, logged(real[each]))
        layer(packed(x_TD)).delta_TD.sum().backward()
    finally:
        for each in names:
            setattr(module, each, real[each])
    return log
