"""Experts move between ranks, with both moments of the optimizer, in one message a layer.

Two phases: what moves is brought everywhere beside what is in force, and only when every rank has
all of it do they switch. What makes it last is the checkpoint that follows: its state.json says
who holds what. Ranks that lost one of them go back to the newest checkpoint, so to the placement
in there, whatever they had come to.
"""

import hashlib
import logging
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from moe_router.dispatch.exchange import exchange
from moe_router.errors import ClusterError
from moe_router.layers.moe import MoE
from moe_router.placement import Placement
from moe_router.training.state import MOMENTS

_log = logging.getLogger(__name__)
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


class Staged(NamedTuple):
    """One layer's experts that have arrived, beside those that are in force.

    Attributes:
        stacks: the layer's own (slots, ...) tensors, moments among them.
        arrived: for each of them, what came.
        take: see `Moves`.
    """

    layer: MoE
    placement: Placement
    stacks: list[Tensor]
    arrived: list[Tensor]
    take: list[int]

    def commit(self) -> None:
        """Put the new placement into force; asks nobody."""
        for stack, part in zip(self.stacks, self.arrived, strict=True):
            stack.copy_(torch.cat([stack, part])[self.take])
        self.layer.placement = self.placement


@torch.no_grad()
def move_all(layers: Sequence[MoE], placements: Placements, optimizer: Optimizer) -> int:
    """Bring every layer's experts to where `placements` has them, between two steps, in two phases:
    nothing changes before every rank has said that all of its experts have arrived.

    All ranks of the default process group together; each keeps its number of slots.

    Returns:
        Slots that got another expert; 0 also where a rank has no room for what would come, for
        then no rank changes anything.

    Raises:
        ClusterError: ranks were given different placements; no rank has changed anything.
        As collectives do, where a rank is lost: those that are left have changed nothing, unless
            every rank had said that it is ready; the next checkpoint says which it was.
    """
    _need_the_same(placements, next(layers[0].parameters()).device)
    staged = stage(layers, placements, optimizer)
    if staged is None:
        return 0
    moved = 0
    for each in staged:
        pairs = zip(
            each.layer.placement.experts_of_rank, each.placement.experts_of_rank, strict=True
        )
        moved += sum(len(set(new) - set(old)) for old, new in pairs)
        each.commit()
    return moved


def stage(
    layers: Sequence[MoE], placements: Placements, optimizer: Optimizer
) -> list[Staged] | None:
    """The first phase: what comes to each rank lies there, and every rank knows that of the others.

    Returns:
        The layers that change; None: some rank had no room.
    """
    changes = [
        _Change.of(layer, placement, optimizer)
        for layer, placement in zip(layers, placements, strict=True)
        if placement != layer.placement
    ]
    device = next(layers[0].parameters()).device
    rooms: list[Tensor] = []
    try:
        rooms += [change.room() for change in changes]
    except RuntimeError as error:  # what torch raises where memory ends, on a CPU and on a GPU
        _log.warning("no room for experts that would come, so none move: %s", error)
    if not _all_say(len(rooms) == len(changes), device):
        return None
    staged = [change.bring(rooms.pop(0)) for change in changes]
    _all_say(True, device)  # it has all arrived, everywhere
    return staged


class _Change(NamedTuple):
    layer: MoE
    placement: Placement
    moves: Moves
    stacks: list[Tensor]

    @classmethod
    def of(cls, layer: MoE, placement: Placement, optimizer: Optimizer) -> "_Change":
        moves = plan_moves(layer.placement, placement, layer.dispatcher.rank)
        stacks = [s for p in layer.experts.parameters() for s in _with_moments(p, optimizer)]
        return cls(layer, placement, moves, stacks)

    def room(self) -> Tensor:
        """As much memory as one message and what comes take, held until the message is made."""
        width = sum(stack[0].numel() for stack in self.stacks)
        rows = sum(map(len, self.moves.send)) + sum(self.moves.receive)
        return self.stacks[0].new_empty(rows, width)

    def bring(self, room: Tensor) -> Staged:
        del room  # for what comes now
        leaving = list(chain.from_iterable(self.moves.send))
        sent = torch.cat([stack[leaving].flatten(1) for stack in self.stacks], 1)
        arrived = exchange(sent, list(map(len, self.moves.send)), self.moves.receive, None)
        sizes = [stack[0].numel() for stack in self.stacks]
        parts = [
            part.reshape(-1, *stack.shape[1:])
            for stack, part in zip(self.stacks, torch.split(arrived, sizes, 1), strict=True)
        ]
        return Staged(self.layer, self.placement, self.stacks, parts, self.moves.take)


def _need_the_same(placements: Placements, device: torch.device) -> None:
    plain = repr([placement.experts_of_rank for placement in placements]).encode()
    digest = int.from_bytes(hashlib.sha256(plain).digest()[:7], "big")
    least_and_most = torch.tensor([digest, -digest], device=device)
    dist.all_reduce(least_and_most, dist.ReduceOp.MIN)
    if int(least_and_most[0]) != -int(least_and_most[1]):
        raise ClusterError(
            "placements: ranks were given different ones, want the same on every rank; nothing "
            "has moved"
        )


def _all_say(ready: bool, device: torch.device) -> bool:
    said = torch.tensor(int(ready), device=device)
    dist.all_reduce(said, dist.ReduceOp.MIN)
    return bool(said)


def _with_moments(parameter: Tensor, optimizer: Optimizer) -> list[Tensor]:
    state = optimizer.state.get(parameter, {})  # none of what does not learn
    return [parameter, *(state[moment] for moment in MOMENTS if moment in state)]
