"""Joules by the GPU's own counter, through NVML's C library: nothing to install."""

import ctypes
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch


@cache
def _nvml() -> tuple[Any, Any] | None:
    """The library and the handle of the first GPU; None without them."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    handle = ctypes.c_void_p()
    if library.nvmlInit_v2() or library.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(handle)):
        return None
    return library, handle


def _millijoules() -> int | None:
    """Since the driver was loaded; None where the GPU does not count."""
    if (found := _nvml()) is None:
        return None
    library, handle = found
    value = ctypes.c_ulonglong()
    failed = library.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(value))
    return None if failed else value.value


def joules(run: Callable[[], Any], *, seconds: float) -> float | None:
    """Of one run, mean over so many seconds of them: the counter moves every 0.1 s or so."""
    if not torch.cuda.is_available() or _millijoules() is None:
        return None
    torch.cuda.synchronize()
    before, until, count = _millijoules(), time.monotonic() + seconds, 0
    while time.monotonic() < until:
        for _ in range(4):
            run()
        torch.cuda.synchronize()
        count += 4
    after = _millijoules()
    assert before is not None and after is not None
    return (after - before) / 1e3 / count
