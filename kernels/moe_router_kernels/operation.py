"""A torch operation that goes through torch's dispatcher only where somebody listens there.

Autograd, tracing, modes and function transforms need `torch.library.custom_op`; for plain tensors
without gradients it costs the host as much as a launch or two, and a step of decoding is dozens.
"""

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

R = TypeVar("R")


class Operation(Generic[R]):
    """A body and its `op`, the same as a custom operation; a call takes the shorter way it can."""

    def __init__(self, name: str, body: Callable[..., R]) -> None:
        self.body = body
        self.op = torch.library.custom_op(name, body, mutates_args=())
        self.register_fake = self.op.register_fake
        self.register_autograd = self.op.register_autograd

    def __call__(self, *args: Any) -> R:
        if torch.compiler.is_compiling() or not unheard(args):
            result: R = self.op(*args)
            return result
        return self.body(*args)


def operation(name: str) -> Callable[[Callable[..., R]], Operation[R]]:
    """Decorator: `name` is that of the custom operation, which changes none of its arguments."""

    def wrap(body: Callable[..., R]) -> Operation[R]:
        return Operation(name, body)

    return wrap


def unheard(args: tuple[Any, ...]) -> bool:
    """Whether neither autograd, nor a mode, nor a transform has a part in a call."""
    if torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack():
        return False
    learns = torch.is_grad_enabled()
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    # a subclass may be anything; a Parameter is a Tensor with a flag
    return all(
        type(t) in (Tensor, torch.nn.Parameter) and not (learns and t.requires_grad)
        for t in tensors
    )
