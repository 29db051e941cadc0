"""What ranks share: which parameters are whose, and the sum of gradients."""

from dataclasses import dataclass
from itertools import chain

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from moe_router.layers.moe import MoE
from moe_router.models import CausalLM

BUCKET = 1 << 23  # elements of one all-reduce: 32 MiB of fp32

# gloo and NCCL raise bare RuntimeErrors: their text is all that tells a lost peer from a bug
_LOST = ("gloo", "NCCL", "Connection closed by peer", "Connection reset", "Broken pipe")


def is_peer_loss(error: BaseException) -> bool:
    """Whether a collective failed because another rank is gone, not because we are wrong."""
    return isinstance(error, dist.DistError) or any(mark in str(error) for mark in _LOST)


@dataclass(frozen=True, slots=True)
class Ownership:
    """Attributes:
    sharded: parameters of which each rank holds a part: experts, and dense ones under FSDP2.
    replicated: parameters that every rank holds whole; their gradients must be summed.
    """

    sharded: list[nn.Parameter]
    replicated: list[nn.Parameter]

    @classmethod
    def of(cls, model: nn.Module) -> "Ownership":
        experts = {id(p) for p in expert_parameters(model)}
        sharded: list[nn.Parameter] = []
        replicated: list[nn.Parameter] = []
        for parameter in model.parameters():
            if parameter.requires_grad:
                apart = id(parameter) in experts or isinstance(parameter, DTensor)
                (sharded if apart else replicated).append(parameter)
        return cls(sharded, replicated)


def moe_layers(model: nn.Module) -> list[MoE]:
    """In the order of the model."""
    return [module for module in model.modules() if isinstance(module, MoE)]


def expert_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The stacked expert weights of this rank."""
    return list(chain.from_iterable(moe.experts.parameters() for moe in moe_layers(model)))


def shard_dense(model: CausalLM, ranks: int) -> None:
    """FSDP2 over all but the experts, which expert parallelism already splits.

    Gradients are summed, not averaged: the loss is a share of a global mean.
    """
    mesh = init_device_mesh(model.embed.weight.device.type, (ranks,))
    experts = set(expert_parameters(model))
    for module in [*model.blocks, model]:
        fully_shard(module, mesh=mesh, ignored_params=experts)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo cannot scale while it sums


def sum_gradients(parameters: list[nn.Parameter]) -> None:
    """Sum gradients over all ranks, in place, in few messages and a fixed order."""
    bucket: list[torch.Tensor] = []
    size = 0
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        bucket.append(parameter.grad)
        size += parameter.numel()
        if size >= BUCKET:
            _sum_bucket(bucket)
            bucket, size = [], 0
    _sum_bucket(bucket)


def _sum_bucket(grads: list[torch.Tensor]) -> None:
    if not grads:
        return
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat)
    parts = torch.split(flat, [grad.numel() for grad in grads])
    for grad, part in zip(grads, parts, strict=True):
        grad.copy_(part.view_as(grad))
