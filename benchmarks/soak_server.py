"""The served run of `benchmarks.soak`: `moe-router serve` in a process of its own, which can be
told to deploy again; and what its processes hold of memory."""

import multiprocessing
import os
import signal
import socket
import uuid
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console

from moe_router.errors import MoeRouterError
from moe_router_cluster.serve import _deploy, serve
from moe_router_cluster.serve_plan import ServeArguments, make_plan

_MARK = "MOE_ROUTER_SOAK"
_START_S = 180.0


def run_server(arguments: ServeArguments, port: int, pipe: Connection) -> None:
    """Serves until it is told to stop."""

    def obey(address: str) -> None:
        pipe.send(address)
        while pipe.recv() == "redeploy":
            try:
                _deploy(make_plan(arguments), port)
                pipe.send("")
            except MoeRouterError as error:
                pipe.send(str(error))
        raise KeyboardInterrupt

    try:
        serve(arguments, port, Console(stderr=True), obey)
    except KeyboardInterrupt:
        pipe.send("ended")


class Server:
    """A `with` block in which a run is served by two shards.

    Attributes:
        address: http://HOST:PORT.
    """

    def __init__(self, run: Path, actors: int) -> None:
        self._mark = uuid.uuid4().hex
        sets = ("cluster.timeout_s=20", "cluster.cpus_per_actor=0.25", "cluster.max_recoveries=20")
        self._arguments = ServeArguments(
            run=str(run), actors=actors, set=sets, grpc_port=_free_port()
        )
        self.address = ""

    def __enter__(self) -> Self:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        os.environ[_MARK] = self._mark
        arguments = (self._arguments, _free_port(), theirs)
        self._process = context.Process(target=run_server, args=arguments)
        self._process.start()
        del os.environ[_MARK]
        theirs.close()
        self.address = self._answer(_START_S)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process.is_alive():
            self._pipe.send("stop")
        self._process.join(60)
        if self._process.is_alive():
            self._process.kill()

    def redeploy(self) -> str:
        """Deploy the same run again; why it failed, or nothing."""
        self._pipe.send("redeploy")
        return str(self._answer(_START_S))

    def kill_a_shard(self) -> None:
        """SIGKILL the process of one of the ranks."""
        shards = [pid for pid, line in self.processes().items() if "ray::ExpertShard" in line]
        os.kill(min(shards), signal.SIGKILL)

    def processes(self) -> dict[int, str]:
        """By id, the command line of each process of the server, Ray's with them."""
        found = {}
        for place in Path("/proc").glob("[0-9]*"):
            try:
                if self._mark.encode() in (place / "environ").read_bytes():
                    found[int(place.name)] = (place / "cmdline").read_text().replace("\0", " ")
            except OSError:  # it ended, or is somebody else's
                continue
        return found

    def memory_mb(self) -> float:
        """Resident memory that is no file's, of all of them: that is what leaks."""
        total = 0
        for pid in self.processes():
            try:
                text = Path(f"/proc/{pid}/status").read_text()
            except OSError:
                continue
            (line,) = [line for line in text.splitlines() if line.startswith("RssAnon:")] or ["x 0"]
            total += int(line.split()[1])
        return total / 1024

    def _answer(self, seconds: float) -> Any:
        if not self._pipe.poll(seconds):
            raise TimeoutError(f"the server said nothing for {seconds:g} s")
        return self._pipe.recv()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
