"""Initial weights that depend on a parameter's name alone, never on how experts are placed."""

import hashlib
import math

import torch
from torch import Tensor, nn

from moe_router.layers.moe import MoE
from moe_router.models.block import Block

STD = 0.02


@torch.no_grad()
def init_parameters(model: nn.Module, seed: int) -> None:
    """Fill every parameter; ranks hold bit for bit their slices of the one-rank model.

    Matrices are normal with standard deviation 0.02; those that write to the residual stream are
    divided by sqrt(2 * layers) (Radford et al. 2019, GPT-2). Norms are 1, biases 0.

    Args:
        model: any module; its routed layers know which experts they hold.
        seed: of the run.
    """
    layers = sum(isinstance(module, Block) for module in model.modules())
    residual_std = STD / math.sqrt(2 * max(layers, 1))
    experts = _expert_ids(model)
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if parameter.dim() < 2:
            parameter.fill_(0.0 if leaf == "bias" else 1.0)
            continue
        writes = name.endswith(("attention.o.weight", "down.weight", "experts.down"))
        std = residual_std if writes else STD
        if owner in experts:
            for slot, expert in enumerate(experts[owner]):
                parameter[slot].copy_(_draw(parameter[slot], std, seed, name, expert))
        else:
            parameter.copy_(_draw(parameter, std, seed, name))


def _expert_ids(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name of each `Experts` module: the global ids of the experts in it."""
    return {
        f"{name}.experts".lstrip("."): moe.placement.experts_of_rank[moe.dispatcher.rank]
        for name, moe in model.named_modules()
        if isinstance(moe, MoE)
    }


def _draw(like: Tensor, std: float, *names: object) -> Tensor:
    """Normal numbers on the CPU in fp32: the same for every device and dtype."""
    digest = hashlib.blake2b("/".join(map(str, names)).encode(), digest_size=8).digest()
    # 63 bits: manual_seed takes an int64
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.empty(like.shape).normal_(0.0, std, generator=generator)
