"""Trainings on this machine that outlive the command that began them: begun, listed, stopped.

A job is a folder with `job.json`, `config.yaml`, `log`, and in the end `ended`: the exit code.
`log` is locked, and keeper and driver hold that lock by writing there: the kernel lets go of it
when the last of them has ended, however it ended.
"""

import asyncio
import fcntl
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import yaml

from moe_router.cli import INTERRUPTED
from moe_router.config import Config
from moe_router.config_file import config_to_dict
from moe_router.errors import ClusterError
from moe_router.observability.files import explained, write_atomic
from moe_router_cluster.faults import Kill
from moe_router_cluster.jobs import Job, new_id

_POLL_S = 0.2  # between two looks at a log that grows


class LocalJobs:
    """The jobs of this user on this machine.

    Args:
        folder: of all jobs; default: $XDG_STATE_HOME/moe_router/jobs.
    """

    option = ""  # what `moe-router jobs` wants to find them

    def __init__(self, folder: Path | None = None) -> None:
        state = Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser()
        self._folder = folder or state / "moe_router" / "jobs"

    def submit(self, config: Config, *, kill: str | None = None, restart: bool = False) -> str:
        """Begin a training here, in the folder of whoever asks; its id.

        Args:
            kill, restart: as of `train`.

        Raises:
            ConfigError: `kill` is no rank or no step of this run.
            MoeRouterError: the disk refused.
        """
        if kill is not None:
            Kill.parse(kill, config)
        id = new_id(config.run.name)
        folder = self._folder / id
        text = yaml.safe_dump(config_to_dict(config), sort_keys=False)
        write_atomic(folder / "config.yaml", text.encode())
        command = ["train", str(folder / "config.yaml"), *(["--kill", kill] if kill else [])]
        keeper = _begin(folder, [*command, *["--restart"] * restart])
        facts = {"run": config.run.name, "group": keeper, "began": time.time()}
        write_atomic(folder / "job.json", json.dumps(facts).encode())
        return id

    def all(self) -> list[Job]:
        """Every job whose folder is still there, the newest last."""
        found = [self.get(path.parent.name) for path in self._folder.glob("*/job.json")]
        return sorted(found, key=lambda job: job.began or 0.0)

    def get(self, id: str) -> Job:
        facts, folder = self._facts(id), self._folder / id
        state, message, ended = "RUNNING", "", None
        if not _is_locked(folder / "log"):
            state, message, ended = _end_of(folder)
        return Job(id, state, message, facts["run"], facts["began"], ended)

    def stop(self, id: str) -> bool:
        """Ask a job to end, which writes its checkpoint first; False if it had ended already."""
        if self.get(id).over:
            return False
        try:
            os.killpg(self._facts(id)["group"], signal.SIGINT)  # what Ctrl-C does in a terminal
        except ProcessLookupError:
            return False
        return True

    async def tail(self, id: str) -> AsyncIterator[str]:
        """The log from its beginning, as it grows, until the job is over."""
        with (self._folder / id / "log").open(errors="replace") as log:
            while True:
                over = self.get(id).over  # before the log is read: then nothing comes after
                if text := log.read():
                    yield text
                elif over:
                    return
                else:
                    await asyncio.sleep(_POLL_S)

    def _facts(self, id: str) -> dict[str, Any]:
        path = self._folder / id / "job.json"
        if "/" in id or not path.is_file():
            raise ClusterError(
                f"{id}: no such job on this machine; `moe-router jobs` lists them, and "
                "`--address URL` asks a cluster"
            )
        facts: dict[str, Any] = json.loads(path.read_text())
        return facts


def _begin(folder: Path, command: list[str]) -> int:
    """Start the keeper, which leads a group and a session of its own: its process id."""
    keep = [sys.executable, "-m", "moe_router_cluster.keep", str(folder / "ended"), *command]
    with explained(folder), (folder / "log").open("w") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        files = [
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_DUP2, log.fileno(), 1),
            (os.POSIX_SPAWN_DUP2, log.fileno(), 2),
        ]
        # setsid: the end of a terminal is not its end
        return os.posix_spawn(keep[0], keep, os.environ, file_actions=files, setsid=True)


def _is_locked(log: Path) -> bool:
    with log.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: others may look as well
        except BlockingIOError:
            return True
        return False


def _end_of(folder: Path) -> tuple[str, str, float]:
    """State, a word on it, and when."""
    ended = folder / "ended"
    if not ended.is_file():
        why = "nobody keeps it any more (a restart of the machine, or somebody killed its keeper)"
        return "FAILED", why, (folder / "log").stat().st_mtime
    code, at = int(ended.read_text()), ended.stat().st_mtime
    if code == 0:
        return "SUCCEEDED", "", at
    return ("STOPPED" if code == INTERRUPTED else "FAILED"), f"it ended with exit code {code}", at
