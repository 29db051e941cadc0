"""What the ranks of a benchmark agree on, and what they tell the process that started them."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PROGRESS = "progress"


class Ranks:
    """They agree over gloo: nothing of it touches a GPU.

    Args:
        folder: rank 0 writes there who is at work, and what was measured.
        excluded: contenders that are not to take part, and why.
    """

    def __init__(self, folder: str, excluded: dict[str, str]) -> None:
        self._folder, self._excluded, self._job = Path(folder), excluded, ""

    def begin(self, job: str) -> None:
        self._job = job
        self.at_work("")

    def at_work(self, contender: str) -> None:
        if dist.get_rank() == 0:
            self._write(PROGRESS, {"job": self._job, "contender": contender})

    def say(self, found: object) -> None:
        if dist.get_rank() == 0:
            self._write(f"{self._job}.json", found)

    def attempt(self, contender: str, run: Callable[[], Any]) -> tuple[Any, str]:
        """What run returns, and "", or None and why there is nothing: the same on all ranks."""
        if contender in self._excluded:
            return None, self._excluded[contender]
        self.at_work(contender)
        found, reason = None, ""
        try:
            found = run()
        except Exception as problem:  # whatever a contender raises is its line in the table
            lines = str(problem).strip().splitlines() or [""]
            reason = f"{type(problem).__name__}: {lines[0][:200]}"
        failed = torch.tensor(int(bool(reason)))
        dist.all_reduce(failed)
        if failed and not reason:
            reason = "failed on another rank"
        return (None if reason else found), reason

    def time_is_up(self, end: float) -> bool:
        over = torch.tensor(int(time.monotonic() > end))
        dist.broadcast(over, 0)
        return bool(over)

    def _write(self, name: str, found: object) -> None:
        partial = self._folder / f"{name}.tmp"
        partial.write_text(json.dumps(found))
        os.replace(partial, self._folder / name)
