"""Experts move between ranks, with both moments of the optimizer, in one message a layer."""

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from moe_router.dispatch.exchange import exchange
from moe_router.layers.moe import MoE
from moe_router.placement import Placement
from moe_router.training.state import MOMENTS

Placements = tuple[Placement, ...]  # of each MoE layer, in order


class Moves(NamedTuple):
    """What one rank does, in numbers of slots.

    Attributes:
        send: slots to each rank.
        receive: how many come from each rank.
        take: of each slot, where its expert now is: an old slot, or, behind those, what came.
    """

    send: list[list[int]]
    receive: list[int]
    take: list[int]


def plan_moves(old: Placement, new: Placement, rank: int) -> Moves:
    """An expert that the rank holds already stays there; others come from one of their copies."""
    copies, ranks = old.copies(), range(old.ranks)
    send: list[list[int]] = [[] for _ in ranks]
    came: list[list[int]] = [[] for _ in ranks]  # experts, by rank
    for to, held in enumerate(new.experts_of_rank):
        for expert in held:
            if expert in old.experts_of_rank[to]:
                continue
            source, slot = copies[expert][to % len(copies[expert])]
            if source == rank:
                send[to].append(slot)
            if to == rank:
                came[source].append(expert)
    there = [*old.experts_of_rank[rank], *chain.from_iterable(came)]
    take = [there.index(expert) for expert in new.experts_of_rank[rank]]
    return Moves(send, [len(experts) for experts in came], take)


def move_all(layers: Sequence[MoE], placements: Placements, optimizer: Optimizer) -> int:
    """`move_experts` of all layers that change. Returns the slots that got another expert."""
    moved = 0
    for layer, placement in zip(layers, placements, strict=True):
        if placement != layer.placement:
            ranks = (layer.placement.experts_of_rank, placement.experts_of_rank)
            moved += sum(len(set(new) - set(old)) for old, new in zip(*ranks, strict=True))
            move_experts(layer, placement, optimizer)
    return moved


@torch.no_grad()
def move_experts(moe: MoE, placement: Placement, optimizer: Optimizer) -> None:
    """Bring a layer's experts to where `placement` has them, between two steps.

    All ranks of the default process group together; each keeps its number of slots.
    """
    moves = plan_moves(moe.placement, placement, moe.dispatcher.rank)
    stacks = [stack for p in moe.experts.parameters() for stack in _with_moments(p, optimizer)]
    leaving = list(chain.from_iterable(moves.send))
    sent = torch.cat([stack[leaving].flatten(1) for stack in stacks], 1)
    arrived = exchange(sent, list(map(len, moves.send)), moves.receive, None)
    sizes = [stack[0].numel() for stack in stacks]
    for stack, part in zip(stacks, torch.split(arrived, sizes, 1), strict=True):
        here = torch.cat([stack, part.reshape(-1, *stack.shape[1:])])
        stack.copy_(here[moves.take])
    moe.placement = placement


def _with_moments(parameter: Tensor, optimizer: Optimizer) -> list[Tensor]:
    state = optimizer.state.get(parameter, {})  # none of what does not learn
    return [parameter, *(state[moment] for moment in MOMENTS if moment in state)]
