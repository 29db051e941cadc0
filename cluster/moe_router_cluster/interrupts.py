"""Ctrl-C and SIGTERM: the first lets the run end cleanly, the second ends it at once."""

import signal
from types import FrameType
from typing import Any, Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """Handles both signals inside a `with`.

    Attributes:
        asked: the user wants the run to end.
        graceful: there is something to save: note the wish instead of raising.
    """

    def __init__(self) -> None:
        self.asked = False
        self.graceful = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self._before = {number: signal.getsignal(number) for number in _SIGNALS}
        self.take_over()
        return self

    def take_over(self) -> None:
        """Handle the signals, also if somebody else has put a handler there since."""
        for number in _SIGNALS:
            signal.signal(number, self._handle)

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked or not self.graceful:
            self.asked = True
            raise KeyboardInterrupt
        self.asked = True
