"""After a NaN: which layer or gradient was the first that is not finite."""

import torch
import torch.distributed as dist
from torch import Tensor, nn


def first_bad_gradient(model: nn.Module, ranks: int) -> str | None:
    """The first parameter, in the model's order, whose gradient is not finite on some rank."""
    named = [(name, p.grad) for name, p in model.named_parameters()]
    bad = [i for i, (_, grad) in enumerate(named) if grad is not None and not _finite(grad)]
    return _first([name for name, _ in named], bad, ranks)


def first_bad_weight(model: nn.Module, ranks: int) -> str | None:
    """The first parameter that is not finite itself."""
    named = list(model.named_parameters())
    bad = [i for i, (_, parameter) in enumerate(named) if not _finite(parameter)]
    return _first([name for name, _ in named], bad, ranks)


class BadActivation:
    """Watches one forward pass for the first module whose output is not finite.

    with BadActivation(model) as watch: model(...)
    """

    def __init__(self, model: nn.Module) -> None:
        self._names = [name for name, _ in model.named_modules()]
        self._modules = dict(model.named_modules())
        self._bad: list[int] = []

    def __enter__(self) -> "BadActivation":
        self._handles = [
            self._modules[name].register_forward_hook(self._hook(i))
            for i, name in enumerate(self._names)
            if not list(self._modules[name].children())
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, index: int):  # type: ignore[no-untyped-def]
        def look(_module: nn.Module, _inputs: object, output: object) -> None:
            if isinstance(output, Tensor) and not _finite(output):
                self._bad.append(index)

        return look

    def first(self, ranks: int) -> str | None:
        """The module's name, agreed by all ranks."""
        return _first(self._names, self._bad[:1], ranks)


def _finite(x: Tensor) -> bool:
    local = x.to_local() if hasattr(x, "to_local") else x
    return bool(local.isfinite().all())


def _first(names: list[str], bad: list[int], ranks: int) -> str | None:
    """names[min(bad)] over all ranks."""
    index = torch.tensor(min(bad, default=len(names)))
    if ranks > 1:
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        index = index.to(device)
        dist.all_reduce(index, dist.ReduceOp.MIN)
    return names[int(index)] if int(index) < len(names) else None
