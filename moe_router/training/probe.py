"""What a forward pass takes: dispatch and combine, the bytes that arrive, a layer's experts."""

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moe_router.dispatch import Dispatcher, Received
from moe_router.layers.moe import MoE


class Stopwatch:
    """A sum of times. On a GPU nothing waits until `microseconds`."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds, self._since = 0.0, 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @property
    def microseconds(self) -> float:
        """Waits for the device."""
        if self._events:
            self._events[-1][1].synchronize()
        return self._seconds * 1e6 + sum(float(a.elapsed_time(b)) * 1e3 for a, b in self._events)

    def start(self) -> None:
        if self._cuda:
            event: Any = torch.cuda.Event  # its constructor has no types
            self._events.append((event(enable_timing=True), event(enable_timing=True)))
            self._events[-1][0].record()
        else:
            self._since = time.perf_counter()

    def stop(self) -> None:
        if self._cuda:
            self._events[-1][1].record()
        else:
            self._seconds += time.perf_counter() - self._since

    @contextmanager
    def timed(self) -> Iterator[None]:
        self.start()
        yield
        self.stop()


class Probe:
    """Sums over the forward passes of one step.

    Args:
        layers: whose experts are timed.
    """

    def __init__(self, device: torch.device, layers: int = 0) -> None:
        self.moving = Stopwatch(device)
        self._experts = [Stopwatch(device) for _ in range(layers)]
        self._bytes: int | None = None

    @property
    def bytes(self) -> int | None:
        """Of the hidden states that reached the experts here; None if nothing was dispatched."""
        return self._bytes

    @property
    def microseconds(self) -> float | None:
        """Of dispatch and combine; None if nothing was dispatched. Waits for the device."""
        return None if self._bytes is None else self.moving.microseconds

    @property
    def expert_us_L(self) -> list[float]:
        """Microseconds that the experts here computed, of each layer. Waits for the device."""
        return [watch.microseconds for watch in self._experts]

    def arrived(self, x_ND: Tensor) -> None:
        self._bytes = (self._bytes or 0) + x_ND.numel() * x_ND.element_size()

    @contextmanager
    def timing(self, layer: int, experts: nn.Module) -> Iterator[None]:
        """Time what these experts compute; waiting for rows is over when they are called."""
        watch = self._experts[layer]
        hooks = (
            experts.register_forward_pre_hook(lambda *_: watch.start()),
            experts.register_forward_hook(lambda *_: watch.stop()),
        )
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


class _Watched(Dispatcher):
    """A dispatcher that tells a probe."""

    def __init__(self, inner: Dispatcher, probe: Probe) -> None:
        self.rank, self.ranks = inner.rank, inner.ranks
        self._inner, self._probe = inner, probe

    def dispatch(self, *args: Any, **named: Any) -> Received:
        with self._probe.moving.timed():
            received = self._inner.dispatch(*args, **named)
        self._probe.arrived(received.coming_ND)  # asking for x_ND would wait for the rows
        return received

    def combine(self, *args: Any, **named: Any) -> Tensor:
        with self._probe.moving.timed():
            return self._inner.combine(*args, **named)

    def total(self, x: Tensor) -> Tensor:
        return self._inner.total(x)

    def exactly(self) -> AbstractContextManager[None]:
        return self._inner.exactly()


@contextmanager
def watched(layers: Sequence[MoE], probe: Probe) -> Iterator[None]:
    """Let `probe` see what these layers move and compute, until the `with` ends.

    Backward passes, also those that compute a layer again, lie outside and are not counted.
    """
    before = [layer.dispatcher for layer in layers]
    with ExitStack() as stack:
        for number, layer in enumerate(layers):
            stack.enter_context(probe.timing(number, layer.experts))
            layer.dispatcher = _Watched(layer.dispatcher, probe)
        try:
            yield
        finally:
            for layer, dispatcher in zip(layers, before, strict=True):
                layer.dispatcher = dispatcher
