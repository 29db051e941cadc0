"""What ranks share: which parameters are whose, and the sum of gradients."""

from dataclasses import dataclass
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from moe_router.dispatch import Grid
from moe_router.dispatch.base import Group
from moe_router.layers.moe import MoE
from moe_router.models import CausalLM, Classifier
from moe_router.training.optimizer import square_sum
from moe_router.training.peers import is_peer_loss as is_peer_loss  # the actor asks here

BUCKET = 1 << 23  # elements of one all-reduce: 32 MiB of fp32


@dataclass(frozen=True, slots=True)
class Ownership:
    """Parameters that learn, in the order of the model.

    Attributes:
        apart: each rank holds another part: experts, and dense ones under FSDP2.
        alike: every rank holds them whole; their gradients must be summed.
        first_slots: by id of a stack of experts, those that are the first copy of theirs.
    """

    apart: list[nn.Parameter]
    alike: list[nn.Parameter]
    first_slots: dict[int, list[int]]

    @classmethod
    def of(cls, model: nn.Module) -> "Ownership":
        experts = {id(p) for p in expert_parameters(model)}
        apart: list[nn.Parameter] = []
        alike: list[nn.Parameter] = []
        for parameter in model.parameters():
            if parameter.requires_grad:
                is_apart = id(parameter) in experts or isinstance(parameter, DTensor)
                (apart if is_apart else alike).append(parameter)
        first_slots = {
            id(parameter): moe.placement.first_slots(moe.dispatcher.rank)
            for moe in moe_layers(model)
            for parameter in moe.experts.parameters()
        }
        return cls(apart, alike, first_slots)

    def fill_gradients(self) -> None:
        """Zeros where no gradient came. The optimizer passes over a parameter without one, so its
        decay would depend on whether a token happened to reach this rank."""
        for parameter in chain(self.apart, self.alike):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def squares(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """fp64 scalars: squares of the gradients `apart`, an expert's on its first rank alone, and
        of those `alike`."""
        apart = []
        for parameter, grad in zip(self.apart, local_gradients(self.apart), strict=True):
            slots = self.first_slots.get(id(parameter))
            whole = slots is None or len(slots) == len(grad)
            apart.append(grad if whole else grad[slots])
        return square_sum(apart, device), square_sum(local_gradients(self.alike), device)


def local_gradients(parameters: list[nn.Parameter]) -> list[Tensor]:
    """The part of each gradient that lies here."""
    grads = [p.grad for p in parameters if p.grad is not None]
    return [g.to_local() if isinstance(g, DTensor) else g for g in grads]


def moe_layers(model: nn.Module) -> list[MoE]:
    """In the order of the model."""
    return [module for module in model.modules() if isinstance(module, MoE)]


def expert_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The stacked expert weights of this rank."""
    return list(chain.from_iterable(moe.experts.parameters() for moe in moe_layers(model)))


def shard_dense(model: CausalLM | Classifier, ranks: int) -> None:
    """FSDP2 over all but the experts, which expert parallelism already splits.

    Gradients are summed, not averaged: the loss is a share of a global mean.
    """
    mesh = init_device_mesh(model.norm.weight.device.type, (ranks,))
    experts = set(expert_parameters(model))
    for module in [*model.blocks, model]:
        fully_shard(module, mesh=mesh, ignored_params=experts)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo cannot scale while it sums


def share_gradients(model: nn.Module, owned: Ownership) -> None:
    """What several ranks hold has one gradient: the sum over them, in place."""
    sum_gradients(owned.alike)
    _sum_copies(model)


def _sum_copies(model: nn.Module) -> None:
    """Sum the gradients of the copies of an expert, in place: each copy gets the whole one."""
    for moe in moe_layers(model):
        if isinstance(moe.dispatcher, Grid):  # a column holds the same experts in the same slots
            sum_gradients(list(moe.experts.parameters()), moe.dispatcher.groups.column)
            continue
        repeated = [e for e, copies in enumerate(moe.placement.copies()) if len(copies) > 1]
        held = moe.placement.experts_of_rank[moe.dispatcher.rank]
        here = [i for i, e in enumerate(repeated) if e in held]
        slots = [held.index(repeated[i]) for i in here]
        for parameter in moe.experts.parameters() if repeated else ():
            if parameter.grad is None:
                continue
            summed = parameter.new_zeros(len(repeated), *parameter.shape[1:])
            summed[here] = parameter.grad[slots]
            parameter.grad[slots] = moe.dispatcher.total(summed)[here]


def sum_gradients(parameters: list[nn.Parameter], group: Group = None) -> None:
    """Sum gradients over the ranks of a group, in place, in few messages and a fixed order."""
    bucket: list[Tensor] = []
    size = 0
    for grad in local_gradients(parameters):
        bucket.append(grad)
        size += grad.numel()
        if size >= BUCKET:
            _sum_bucket(bucket, group)
            bucket, size = [], 0
    if bucket:
        _sum_bucket(bucket, group)


def _sum_bucket(grads: list[Tensor], group: Group) -> None:
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat, group=group)
    parts = torch.split(flat, [grad.numel() for grad in grads])
    for grad, part in zip(grads, parts, strict=True):
        grad.copy_(part.view_as(grad))
