"""What happened to a run, one JSON object a line: who says it, and at which step and epoch.

Numbers of each step are in metrics.csv; this is for what happens now and then.
"""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from moe_router.observability.files import explained

Fact = str | int | float | bool | None | list[int]


class EventLog:
    """Appends; a killed process leaves whole lines, for each goes out in one unbuffered write.

    Args:
        path: made with its folder by the first line.
        facts: what every line carries, asked anew for each: rank, step, epoch.
    """

    def __init__(self, path: Path, facts: Callable[[], Mapping[str, Fact]]) -> None:
        self.path = path
        self._facts = facts

    def write(self, event: str, **more: Fact) -> None:
        """One line: time (ISO 8601, with the zone), event, the facts, and `more`.

        Raises:
            MoeRouterError: the disk refused.
        """
        now = time.time()
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(now))
        stamp = f"{moment}.{int(now % 1 * 1000):03}{time.strftime('%z', time.localtime(now))}"
        line = json.dumps({"time": stamp, "event": event, **self._facts(), **more}) + "\n"
        with explained(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab", buffering=0) as out:
                out.write(line.encode())
