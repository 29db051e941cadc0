"""First weights, each drawn by its own generator: the same for any number of ranks."""

import hashlib

import torch
from torch import Tensor, nn

from moe_router.layers.moe import MoE
from moe_router.models.block import Block, RMSNorm

STD = 0.02


def init_parameters(model: nn.Module, seed: int) -> None:
    """Draw every parameter by a generator seeded with (seed, its global name, expert id).

    Matrices are normal with std 0.02; those that write to the residual are smaller by
    sqrt(2 * layers). Norms are 1, biases 0.
    """
    modules = list(model.modules())
    layers = sum(isinstance(module, Block) for module in modules)
    residual = STD / (2 * max(layers, 1)) ** 0.5
    moes = [module for module in modules if isinstance(module, MoE)]
    experts = {id(p): moe for moe in moes for p in moe.experts.parameters()}
    norms = {id(m.weight) for m in modules if isinstance(m, RMSNorm)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            std = residual if name.endswith(("attention.o.weight", "down.weight", ".down")) else STD
            if id(parameter) in norms:
                parameter.fill_(1.0)
            elif name.endswith("bias"):
                parameter.zero_()
            elif (moe := experts.get(id(parameter))) is not None:
                held = moe.placement.experts_of_rank[moe.dispatcher.rank]
                for slot, expert in enumerate(held):
                    _draw(parameter[slot], std, f"{seed}/{name}/{expert}")
            else:
                _draw(parameter, std, f"{seed}/{name}")


def _draw(weight: Tensor, std: float, name: str) -> None:
    digest = hashlib.sha256(name.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    weight.copy_(torch.empty(weight.shape).normal_(0.0, std, generator=generator))
