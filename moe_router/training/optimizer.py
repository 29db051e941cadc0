"""AdamW in fp32, its schedule, and clipping by a norm."""

import math

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moe_router.config import TrainConfig

RATE = "times_lr"  # of a group's parameters


def is_router(name: str) -> bool:
    """Whether a parameter decides who is computed, not what."""
    return any(part in ("router", "predictor") for part in name.split("."))


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over what can learn; only matrices decay, and routers have a rate of their own. Its
    state exists before the first step, so that a checkpoint has the same tensors at every step.

    Source: Loshchilov & Hutter 2017, arXiv:1711.05101.
    """
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    kinds: dict[tuple[bool, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        # fused takes lists of one kind; under FSDP2 experts are plain tensors, the rest is not
        kind = (parameter.dim() >= 2, is_router(name), isinstance(parameter, DTensor))
        kinds.setdefault(kind, []).append(parameter)
    optimizer = torch.optim.AdamW(
        [
            {
                "params": alike,
                "weight_decay": config.weight_decay if is_matrix else 0.0,
                RATE: config.router_lr if decides else 1.0,
            }
            for (is_matrix, decides, _), alike in kinds.items()
        ],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        fused=True,
    )
    for parameter in parameters.values():
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Of the next step, for each group."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group[RATE]


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then a cosine from lr to min_lr * lr at the last step.

    Args:
        step: optimizer steps done before this one.
    """
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = (step + 1 - config.warmup) / max(1, config.steps - config.warmup)
    low = config.min_lr
    return config.lr * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))


def set_step(optimizer: torch.optim.Optimizer, step: int) -> None:
    """After a restore: the count that bias correction uses."""
    for state in optimizer.state.values():
        state["step"].fill_(step)


def square_sum(grads: list[Tensor], device: torch.device) -> Tensor:
    """fp64 scalar: the sum of the squares of all elements, tensor by tensor."""
    squares = [torch.linalg.vector_norm(grad).double().square() for grad in grads]
    return torch.stack(squares).sum() if squares else torch.zeros((), device=device).double()


def clip(grads: list[Tensor], norm: float, limit: float) -> None:
    """Scale gradients in place so that their norm is at most `limit`; 0 is off.

    Args:
        norm: L2, of the global gradient that `grads` are a part of.
    """
    if 0 < limit < norm:
        for grad in grads:
            grad.mul_(limit / norm)
