"""Where the Triton kernels run. Not every machine has Triton, and its import takes time, so those
who choose it import it."""

import importlib.util
import logging
import os
from collections.abc import Callable
from functools import cache
from typing import TypeVar

import torch

_log = logging.getLogger(__name__)
_F = TypeVar("_F", bound=Callable[..., object])


def constant_while_tracing(function: _F) -> _F:
    """`torch.compiler.assume_constant_result`, which imports the compiler: one second of every
    process. While torch.compile traces, the function runs once and its result is a constant."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def runs_triton(device: torch.device) -> bool:
    """Whether the Triton kernels run on tensors of this device: compiled, or interpreted."""
    why: str = _obstacle(device)
    return not why


def uses_triton(op: str, kernels: str, device: torch.device, uncovered: str = "") -> bool:
    """Whether an operation takes its Triton kernel; if not, the log says once why.

    Args:
        kernels: `auto` asks for it on a GPU, `triton` wherever it runs, `reference` never.
        uncovered: what of the problem the kernel does not cover; empty if nothing.
    """
    if kernels == "reference":
        return False
    interpreted = kernels == "auto" and device.type != "cuda"
    why: str = _obstacle(device) or uncovered or ("slower when interpreted" if interpreted else "")
    if why:
        _say(op, kernels, why)
    return not why


@constant_while_tracing
def _obstacle(device: torch.device) -> str:
    if not _has_triton():
        return "Triton is not installed"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"Triton does not run on {device.type}"
    return ""


@constant_while_tracing
def _say(op: str, kernels: str, why: str) -> None:
    _say_once(op, kernels, why)


@cache
def _say_once(op: str, kernels: str, why: str) -> None:
    _log.info("kernels=%s: %s takes plain torch: %s", kernels, op, why)


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
