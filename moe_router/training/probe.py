"""What dispatch and combine of a forward pass take: time, and the bytes that arrive."""

import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from moe_router.dispatch import Dispatcher, Received
from moe_router.layers.moe import MoE


class Probe:
    """Sums over the forward passes of one step. On a GPU nothing waits until `microseconds`."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._bytes: int | None = None

    @property
    def bytes(self) -> int | None:
        """Of the hidden states that reached the experts here; None if nothing was dispatched."""
        return self._bytes

    @property
    def microseconds(self) -> float | None:
        """None if nothing was dispatched. Waits for the device."""
        if self._bytes is None:
            return None
        if self._events:
            self._events[-1][1].synchronize()
        return self._seconds * 1e6 + sum(float(a.elapsed_time(b)) * 1e3 for a, b in self._events)

    def arrived(self, x_ND: Tensor) -> None:
        self._bytes = (self._bytes or 0) + x_ND.numel() * x_ND.element_size()

    @contextmanager
    def timed(self) -> Iterator[None]:
        if self._cuda:
            event: Any = torch.cuda.Event  # its constructor has no types
            began, ended = event(enable_timing=True), event(enable_timing=True)
            began.record()
            yield
            ended.record()
            self._events.append((began, ended))
            return
        started = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - started


class _Watched(Dispatcher):
    """A dispatcher that tells a probe."""

    def __init__(self, inner: Dispatcher, probe: Probe) -> None:
        self.rank, self.ranks = inner.rank, inner.ranks
        self._inner, self._probe = inner, probe

    def dispatch(self, *args: Any, **named: Any) -> Received:
        with self._probe.timed():
            received = self._inner.dispatch(*args, **named)
        self._probe.arrived(received.coming_ND)  # asking for x_ND would wait for the rows
        return received

    def combine(self, *args: Any, **named: Any) -> Tensor:
        with self._probe.timed():
            return self._inner.combine(*args, **named)

    def total(self, x: Tensor) -> Tensor:
        return self._inner.total(x)

    def exactly(self) -> AbstractContextManager[None]:
        return self._inner.exactly()


@contextmanager
def watched(layers: Iterable[MoE], probe: Probe) -> Iterator[None]:
    """Let `probe` see what these layers move, until the `with` ends.

    Backward passes, also those that compute a layer again, lie outside and are not counted.
    """
    before = [(layer, layer.dispatcher) for layer in layers]
    for layer, dispatcher in before:
        layer.dispatcher = _Watched(dispatcher, probe)
    try:
        yield
    finally:
        for layer, dispatcher in before:
            layer.dispatcher = dispatcher
