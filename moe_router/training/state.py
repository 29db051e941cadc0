"""The tensors of a checkpoint by global name: one name per expert, so any W can read any W.

blocks.0.attention.q.weight             every rank holds it, or its shard of it
blocks.0.moe.experts.3.gate_up          expert 3, wherever it lives
optimizer/exp_avg/blocks.0.moe.experts.3.gate_up
"""

import re
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from moe_router.training.parallel import moe_layers

OPTIMIZER = "optimizer/"
MOMENTS = ("exp_avg", "exp_avg_sq")
_EXPERT = re.compile(r"(?<=\.experts\.)\d+(?=\.)")


def any_expert(name: str) -> str:
    """The name with its expert's number blotted out; other names stay as they are."""
    return _EXPERT.sub("*", name)


def named_weights(model: nn.Module, *, once: bool = False) -> dict[str, Tensor]:
    """Every parameter and persistent buffer that this rank holds, by global name.

    The tensors are views: writing to them writes to the model.

    Args:
        once: of the copies of an expert, name only the one on the first rank.
    """
    held = _experts_held(model, once)
    weights = model.state_dict().items()
    return {piece: part for name, tensor in weights for piece, part in _pieces(name, tensor, held)}


def named_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, *, once: bool = False
) -> dict[str, Tensor]:
    """`named_weights` and both moments of the optimizer."""
    held = _experts_held(model, once)
    out = named_weights(model, once=once)
    for name, parameter in model.named_parameters():
        for moment in MOMENTS if parameter in optimizer.state else ():
            tensor = optimizer.state[parameter][moment]
            for piece, part in _pieces(name, tensor, held):
                out[f"{OPTIMIZER}{moment}/{piece}"] = part
    return out


def _experts_held(model: nn.Module, once: bool) -> dict[str, dict[int, int]]:
    """Name of each stacked expert weight to the global ids of its slots."""
    held = {}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for moe in moe_layers(model):
        rank = moe.dispatcher.rank
        experts = moe.placement.experts_of_rank[rank]
        slots = moe.placement.first_slots(rank) if once else range(len(experts))
        for parameter in moe.experts.parameters():
            held[names[id(parameter)]] = {slot: experts[slot] for slot in slots}
    return held


def _pieces(
    name: str, tensor: Tensor, held: dict[str, dict[int, int]]
) -> Iterator[tuple[str, Tensor]]:
    tensor = tensor.detach()
    if name not in held:
        yield name, tensor
        return
    prefix, leaf = name.rsplit(".", 1)
    for slot, expert in held[name].items():
        yield f"{prefix}.{expert}.{leaf}", tensor[slot]
