"""Step time and balance of a recorded routing on a topology.

A step is: all that is not experts or dispatch, the experts of each layer on its busiest rank, two
dispatches and combines of each layer, forward and backward, and the sum of the gradients that all
ranks hold. Nothing is taken to overlap, and ranks wait for the slowest in every layer.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from moe_router.dispatch.cost_model import Link, Problem, best, seconds_by_rank
from moe_router.errors import ConfigError
from moe_router.simulation.recording import Recording, Shape
from moe_router.simulation.replay import Replayed, replay
from moe_router.simulation.topology import Topology


@dataclass(frozen=True, slots=True)
class Simulated:
    """Means over the recorded steps.

    Attributes:
        tokens: of a rank in a micro-step.
        step_s: by transport, of the whole step; the others are parts of it.
        moving_s: by transport, dispatch and combine of all layers, there and back.
        expert_s, gradient_s, rest_s: of the busiest rank, layer by layer; of the sum; of the rest.
        transport: what the topology names, or the fastest.
        imbalance_L: rows of a layer's busiest rank over the mean of all, weighed over steps.
        rows_per_token: messages that a token needs: one for each rank that serves it.
        sent_bytes: that leave the busiest rank for others, in a layer's dispatch.
        dropped: share of the choices that capacity turned away.
        overflows: share of the layers whose rows find no slot in a static transport.
    """

    tokens: int
    step_s: dict[str, float]
    moving_s: dict[str, float]
    expert_s: float
    gradient_s: float
    rest_s: float
    transport: str
    imbalance_L: list[float]
    rows_per_token: float
    sent_bytes: float
    dropped: float
    overflows: float

    @property
    def tokens_per_s(self) -> float:
        """Of one rank."""
        return self.tokens / self.step_s[self.transport]


def simulate(recording: Recording, topology: Topology) -> Simulated:
    """Replay every recorded step.

    Raises:
        ConfigError: too few tokens for so many ranks, or a transport that the topology lacks.
    """
    link, shape = topology.link, recording.shape
    micros = list(_micro_steps(recording, topology))
    T, K = micros[0].shape[-2:]
    problem = Problem(T, K, shape.experts, topology.ranks, shape.dim, shape.itemsize)
    layers = [[_layer(routed, shape, topology) for routed in micro] for micro in micros]
    every = [layer for micro in layers for layer in micro]
    per_step = shape.accumulation / len(micros)
    moving_s: dict[str, float] = {}
    for layer in every:
        for name, took_W in seconds_by_rank(link, problem, layer.load).items():
            moving_s[name] = moving_s.get(name, 0.0) + 2 * per_step * float(took_W.max())
    expert_s = per_step * topology.expert_row_s * sum(float(x.choices_W.max()) for x in every)
    rest_s = shape.accumulation * topology.rest_token_s * T
    gradient_s = sum_gradients_s(link, shape.dense_bytes)
    step_s = {n: rest_s + expert_s + gradient_s + took for n, took in moving_s.items()}
    return Simulated(
        tokens=T * shape.accumulation, step_s=step_s, moving_s=moving_s, expert_s=expert_s,
        gradient_s=gradient_s, rest_s=rest_s, transport=_taken(topology, step_s, problem),
        imbalance_L=[_imbalance([micro[i] for micro in layers]) for i in range(len(layers[0]))],
        **_rows(every, problem),
    )  # fmt: skip


def sum_gradients_s(link: Link, nbytes: int) -> float:
    """All-reduce as reduce-scatter and all-gather: inside a machine, of the parts between them."""
    node = min(link.per_node or link.ranks, link.ranks)
    near = (node - 1) / node * nbytes
    rates = (link.bytes_per_s[name] for name in ("reduce_scatter", "all_gather"))
    nodes = link.ranks // node
    far = 2 * (nodes - 1) / nodes * nbytes / node / link.far_bytes_per_s
    return sum(near / rate for rate in rates) + far


def _micro_steps(recording: Recording, topology: Topology) -> Iterator[Tensor]:
    """(L, W, T, K) each: tokens shared out in their order, from the first again after the last."""
    W = topology.ranks
    for routed in recording.steps.values():
        for part in routed.chunk(recording.shape.accumulation, 1):
            L, recorded, K = part.shape
            T = topology.tokens or recorded // W
            if T == 0:
                raise ConfigError(
                    f"ranks={W}: {recorded} recorded tokens in a micro-step; want at least one a "
                    "rank: set tokens, which takes them again and again"
                )
            index_N = torch.arange(W * T) % recorded
            yield part[:, index_N].view(L, W, T, K)


def _layer(target_WTK: Tensor, shape: Shape, topology: Topology) -> Replayed:
    held = target_WTK[target_WTK >= 0].long()
    load_E = torch.bincount(held, minlength=shape.experts)
    placement = topology.place(load_E.tolist())
    capacity = None
    if topology.capacity_factor is not None:
        T, K = target_WTK.shape[1:]
        factor = Fraction(str(topology.capacity_factor))
        capacity = min(T, math.ceil(factor * T * K / shape.experts))
    return replay(target_WTK, placement, topology.row_bound, capacity)


def _taken(topology: Topology, step_s: dict[str, float], problem: Problem) -> str:
    if topology.transport == "auto":
        return best(step_s, problem)
    if topology.transport not in step_s:
        raise ConfigError(
            f"transport={topology.transport}: cannot run on this topology; want one of "
            f"{', '.join(step_s)}, or its rate and its fixed_s, on one machine"
        )
    return topology.transport


def _imbalance(layers: list[Replayed]) -> float:
    busiest = sum(float(layer.choices_W.max()) for layer in layers)
    mean = sum(float(layer.choices_W.mean()) for layer in layers)
    return busiest / mean if mean else 1.0


def _rows(layers: list[Replayed], problem: Problem) -> dict[str, float]:
    rows_WW = torch.stack([layer.load.rows_WW for layer in layers])
    leaving_W = rows_WW.sum(2) - rows_WW.diagonal(dim1=1, dim2=2)
    tokens = len(layers) * problem.tokens * problem.ranks
    return {
        "rows_per_token": float(rows_WW.sum()) / tokens,
        "sent_bytes": float(leaving_W.amax(1).mean()) * (problem.row + problem.ids),
        "dropped": sum(layer.dropped for layer in layers) / (tokens * problem.top_k),
        "overflows": sum(layer.overflows for layer in layers) / len(layers),
    }
