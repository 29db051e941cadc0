"""After a NaN: which weight, layer or gradient was the first that is not finite."""

from collections.abc import Callable
from types import TracebackType

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moe_router.errors import NonFiniteError


def first_cause(model: nn.Module, ranks: int, forward_again: Callable[[], None]) -> str:
    """The first cause, the same on every rank; all of them must ask.

    Args:
        model: as the backward pass left it, gradients and all.
        forward_again: repeats the forward passes of the step, without gradient.
    """
    named = list(model.named_parameters())
    names = [name for name, _ in named]
    weight = _least([i for i, (_, p) in enumerate(named) if not _finite(p)], len(named), ranks)
    if weight < len(named):
        return f"weight {names[weight]}"
    with torch.no_grad(), _Watch(model) as watch:
        forward_again()
    module = _least(watch.bad[:1], len(watch.names), ranks)
    if module < len(watch.names):
        return f"output of {watch.names[module] or 'the model'}"
    # the last of the model is the first in backward; what lies before it caught it from there
    backward = [(n, p.grad) for n, p in reversed(named)]
    bad = [i for i, (_, grad) in enumerate(backward) if grad is not None and not _finite(grad)]
    gradient = _least(bad, len(backward), ranks)
    return f"gradient of {backward[gradient][0]}" if gradient < len(backward) else "loss"


def not_finite(step: int, loss: float, norm: float, cause: str) -> NonFiniteError:
    """What to say of the step after `step`, which is not taken."""
    return NonFiniteError(
        f"step {step + 1}: loss {loss:.6g}, gradient norm {norm:.6g}; the first that is "
        f"not finite is the {cause}; the weights are those of step {step}: lower "
        "train.lr or raise train.warmup, and go on from the last checkpoint"
    )


class _Watch:
    """Notes the modules whose output is not finite, in the order in which they ran."""

    def __init__(self, model: nn.Module) -> None:
        named = list(model.named_modules())
        self.names = [name for name, _ in named]
        self.bad: list[int] = []
        self._modules = [module for _, module in named]

    def __enter__(self) -> "_Watch":
        self._handles = [
            module.register_forward_hook(self._hook(i)) for i, module in enumerate(self._modules)
        ]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, index: int) -> Callable[[nn.Module, object, object], None]:
        def look(_module: nn.Module, _inputs: object, output: object) -> None:
            value = getattr(output, "logits", output)
            if isinstance(value, Tensor) and value.is_floating_point() and not _finite(value):
                self.bad.append(index)

        return look


def _finite(x: Tensor) -> bool:
    local = x.to_local() if isinstance(x, DTensor) else x
    return bool(local.isfinite().all())


def _least(found: list[int], none: int, ranks: int) -> int:
    """The least index that any rank found, `none` if no rank did."""
    index = torch.tensor(min(found, default=none))
    if ranks > 1:
        if dist.get_backend() == "nccl":
            index = index.cuda()
        dist.all_reduce(index, dist.ReduceOp.MIN)
    return int(index)
