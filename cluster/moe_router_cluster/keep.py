"""Keeps a submitted training alive: starts its driver again when it is killed.

    python -m moe_router_cluster.keep ENDED train config.yaml

ENDED: a file to write the exit code to in the end; - for none.

A driver that ends by itself, well or with an error, has ended the run; one that a signal ended (the
kernel short of memory, somebody's kill -9) has not, and the same command goes on from the newest
checkpoint. It holds nothing itself, so it is no second point of failure worth guarding.
"""

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

_RESTART = "--restart"  # moves an older run aside: only the first driver may
_SHORT_S = 60.0  # a driver that is killed sooner than this has done little
_MOST = 5  # such drivers, one after another, after which it gives up
_PAUSE_S = 2.0


class Keeper:
    """Args:
    command: of the driver.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self._command = list(command)
        self._stopped = False

    def run(self) -> int:
        """Until the driver ends by itself, or is stopped.

        Returns:
            Its exit code; 128 + the signal of one that was killed too often.
        """
        # whoever stops a job signals the driver as well, so there is nothing to pass on
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)
        in_vain = 0
        while True:
            began = time.monotonic()
            code = subprocess.call(self._command)
            if code >= 0:
                return code
            in_vain = in_vain + 1 if time.monotonic() - began < _SHORT_S else 1
            if not self._stopped and in_vain < _MOST:
                name = signal.Signals(-code).name
                print(f"the driver was killed ({name}); it starts again", flush=True)
                self._command = [word for word in self._command if word != _RESTART]
                time.sleep(_PAUSE_S)
            if self._stopped or in_vain == _MOST:  # it may have been stopped in the pause
                return 128 - code

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._stopped = True


def main(ended: str, *arguments: str) -> int:
    code = Keeper([sys.executable, "-m", "moe_router_cluster.cli", *arguments]).run()
    if ended != "-":
        Path(ended).write_text(str(code))
    return code


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
