"""AdamW in fp32, its schedule, and clipping by the true global norm."""

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moe_router.config import TrainConfig


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over what can learn; only matrices decay. Its state exists before the first step, so
    that a checkpoint has the same tensors at every step.

    Source: Loshchilov & Hutter 2017, arXiv:1711.05101.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in parameters if p.dim() >= 2]
    vectors = [p for p in parameters if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    fused = not any(isinstance(p, DTensor) for p in parameters)
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        fused=fused,
        foreach=False,
    )
    for parameter in parameters:
        device = parameter.device if fused else "cpu"
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then a cosine from lr to min_lr * lr at the last step.

    Args:
        step: optimizer steps done before this one.
    """
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    low = config.min_lr
    return config.lr * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))


def set_step(optimizer: torch.optim.Optimizer, step: int) -> None:
    """After a restore: the count that bias correction uses."""
    for state in optimizer.state.values():
        state["step"].fill_(step)


def clip_by_global_norm(
    sharded: Iterable[nn.Parameter], replicated: Iterable[nn.Parameter], limit: float, ranks: int
) -> Tensor:
    """Scale all gradients so that their global L2 norm is at most `limit`; 0 only measures.

    Args:
        sharded: parameters of which each rank holds a different part: their squares are summed.
        replicated: parameters with equal gradients on all ranks: counted once.

    Returns:
        The norm before clipping, fp64 scalar, the same on every rank.
    """
    shares = [_local(p.grad) for p in sharded if p.grad is not None]
    copies = [_local(p.grad) for p in replicated if p.grad is not None]
    square = _square_sum(shares, (shares + copies)[0].device)
    if ranks > 1:
        dist.all_reduce(square)
    norm = (square + _square_sum(copies, square.device)).sqrt()
    if limit > 0:
        scale = (limit / (norm + 1e-6)).clamp(max=1.0)
        for grad in shares + copies:
            grad.mul_(scale.to(grad.dtype))
    return norm


def _local(grad: Tensor) -> Tensor:
    return grad.to_local() if isinstance(grad, DTensor) else grad


def _square_sum(grads: list[Tensor], device: torch.device) -> Tensor:
    """fp64 scalar: sum of squares, tensor by tensor."""
    squares = [torch.linalg.vector_norm(grad).double().square() for grad in grads]
    return torch.stack(squares).sum() if squares else torch.zeros((), device=device).double()
