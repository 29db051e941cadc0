"""Replicas: checkpoints in the memory of other processes, on other nodes where there are any.

Every few steps each rank sends what it would write to a disk to an actor that holds it, its peer.
Losing every rank at once then costs those few steps, not those since the last checkpoint.
"""

import hashlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from moe_router.errors import CheckpointError
from moe_router.training.checkpoint_files import STATE, fresh_folder, state_text

_ray: Any = ray  # half of its functions have no types
SCHEME = "replica://"
_CHUNK = 16 << 20  # bytes of one message: what passes through Ray's object store at a time
_ANSWER_S = 10.0  # then a holder counts as gone


class ReplicaHolder:
    """One rank's files of the newest whole step, and of the one that is coming."""

    def __init__(self) -> None:
        self._steps: dict[int, dict[str, bytearray]] = {}

    def begin(self, step: int) -> None:
        """Make room: what is not whole goes, and all whole steps but the newest."""
        whole = [each for each in self.whole() if each != step]
        self._steps = {each: self._steps[each] for each in whole[-1:]} | {step: {}}

    def put(self, step: int, name: str, chunk: bytes) -> None:
        """The next bytes of a file; late ones of a step that was given up are dropped."""
        if step in self._steps:
            self._steps[step].setdefault(name, bytearray()).extend(chunk)

    def whole(self) -> list[int]:
        """Steps that every rank has sent, ascending."""
        return sorted(step for step, files in self._steps.items() if STATE in files)

    def sizes(self, step: int) -> dict[str, int]:
        files = self._steps.get(step, {})
        return {name: len(data) for name, data in files.items() if name != STATE}

    def get(self, step: int, name: str, start: int) -> bytes:
        """A chunk; b"" past the end."""
        return bytes(self._steps.get(step, {}).get(name, b"")[start : start + _CHUNK])


# num_cpus=0: it must not take a core that a rank was promised. max_restarts: one that comes back
# empty has no whole step, and is filled again
HolderActor = _ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=0)(ReplicaHolder)


def place_holders(nodes: Sequence[str], environment: dict[str, str]) -> list[Any]:
    """A holder for each rank, not on its node if there is another.

    Args:
        nodes: id of the node of each rank.
    """
    alive = [node["NodeID"] for node in _ray.nodes() if node["Alive"]]
    holders = []
    for rank, node in enumerate(nodes):
        next_ones = [*nodes[rank + 1 :], *nodes[:rank], *alive]
        other = next((each for each in next_ones if each != node), node)
        there = NodeAffinitySchedulingStrategy(other, soft=True)
        runtime = {"env_vars": environment}
        holders.append(HolderActor.options(scheduling_strategy=there, runtime_env=runtime).remote())
    return holders


class ReplicaStore:
    """The holders of a run as a `Store`; a step is called replica://step_N.

    Args:
        holders: of each rank that the run began with.
        rank: of who writes; `latest` and `local` need none.
        run_dir: names the scratch folder in memory, which the next process of this rank reuses.
    """

    def __init__(self, holders: Sequence[Any], run_dir: Path, rank: int = 0) -> None:
        self._holders, self._rank = list(holders), rank
        memory = Path("/dev/shm")
        root = memory if memory.is_dir() else Path(tempfile.gettempdir())
        name = hashlib.sha256(str(run_dir).encode()).hexdigest()[:16]
        self._scratch = root / f"moe_router-{name}-{rank}"

    def latest(self) -> str | None:
        try:
            whole = self._ask("whole")
            common = set(whole[0]).intersection(*whole[1:])
            return self.where(max(common)) if common else None
        except CheckpointError:
            return None

    @contextmanager
    def local(self, step: str) -> Iterator[Path]:
        try:
            yield self.bring(step, self._scratch)
        finally:
            self.clear()

    def bring(self, step: str, run_dir: Path) -> Path:
        folder, number = run_dir / step.removeprefix(SCHEME), int(step.rsplit("_", 1)[-1])
        fresh_folder(folder)
        for holder, sizes in zip(self._holders, self._ask("sizes", number), strict=True):
            for name in (*sizes, STATE):
                with (folder / name).open("wb") as out:
                    while chunk := self._get(holder.get.remote(number, name, out.tell())):
                        out.write(chunk)
        return folder

    def where(self, step: int) -> str:
        return f"{SCHEME}step_{step}"

    def begin(self, step: int) -> None:
        fresh_folder(self.partial(step))
        if self._rank == 0:
            self._ask("begin", step)

    def partial(self, step: int) -> Path:
        return self._scratch / f"step_{step}"

    def sent(self, step: int) -> None:
        mine = self._holders[self._rank]
        for file in sorted(self.partial(step).iterdir()):
            with file.open("rb") as data:
                while chunk := data.read(_CHUNK):
                    self._get(mine.put.remote(step, file.name, chunk))
        self.clear()

    def publish(self, step: int, about: dict[str, Any]) -> None:
        files = {name: size for sizes in self._ask("sizes", step) for name, size in sizes.items()}
        self._ask("put", step, STATE, state_text(about, files).encode())

    def prune(self, keep: int) -> None:
        """`begin` makes room."""

    def discard(self, step: int) -> None:
        self.clear()

    def clear(self) -> None:
        """Remove what is left in this node's memory, of a process that was killed too."""
        shutil.rmtree(self._scratch, ignore_errors=True)

    def _ask(self, method: str, *args: Any) -> list[Any]:
        answers: list[Any] = self._get([getattr(h, method).remote(*args) for h in self._holders])
        return answers

    def _get(self, refs: Any) -> Any:
        try:
            return ray.get(refs, timeout=_ANSWER_S)
        except (RayError, GetTimeoutError) as error:
            raise CheckpointError(
                f"a holder of replicas is gone: {type(error).__name__}"
            ) from error


def newest(*steps: str | None) -> str | None:
    """The latest of some checkpoints, by the number in their names; the first of equal ones."""
    return max(filter(None, steps), key=lambda step: int(step.rsplit("_", 1)[-1]), default=None)
