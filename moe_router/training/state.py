"""The tensors of a checkpoint by global name: one name per expert, so any W can read any W."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from moe_router.training.parallel import moe_layers


def named_weights(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and persistent buffer that this rank holds, by global name.

    The stacked experts of a layer appear one by one: `blocks.0.moe.experts.3.gate_up` is expert 3,
    wherever it lives. The tensors are views: writing to them writes to the model.
    """
    held = _experts_held(model)
    out: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        out.update(_pieces(name, tensor, held))
    return out


def named_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """`named_weights` and both moments of the optimizer, under `optimizer/`."""
    held = _experts_held(model)
    out = named_weights(model)
    for name, parameter in model.named_parameters():
        for moment in ("exp_avg", "exp_avg_sq"):
            if parameter in optimizer.state:
                tensor = optimizer.state[parameter][moment]
                for piece, value in _pieces(name, tensor, held):
                    out[f"optimizer/{moment}/{piece}"] = value
    return out


def _experts_held(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name of each stacked expert weight to the global ids of its slices."""
    held = {}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for moe in moe_layers(model):
        experts = moe.placement.experts_of_rank[moe.dispatcher.rank]
        for parameter in moe.experts.parameters():
            held[names[id(parameter)]] = experts
    return held


def _pieces(
    name: str, tensor: Tensor, held: dict[str, tuple[int, ...]]
) -> Iterator[tuple[str, Tensor]]:
    tensor = tensor.detach()
    if name not in held:
        yield name, tensor
        return
    prefix, leaf = name.rsplit(".", 1)
    for slot, expert in enumerate(held[name]):
        yield f"{prefix}.{expert}.{leaf}", tensor[slot]
