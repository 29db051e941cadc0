"""Checkpoints: safetensors and a state.json, written while training goes on, put in place whole.

Any number of ranks reads what any number wrote. Nothing is ever unpickled.
"""

import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_router.config import Config
from moe_router.config_file import config_to_dict
from moe_router.errors import CheckpointError
from moe_router.training.checkpoint_files import latest_checkpoint, read_about
from moe_router.training.checkpoint_store import Store, open_store
from moe_router.training.checkpoint_tensors import Snapshot, read_tensors
from moe_router.training.peers import peers_may_be_lost

__all__ = ["CheckpointWriter", "latest_checkpoint", "read_about", "read_checkpoint"]

_REASON_BYTES = 512  # of an error's text, sent to the other ranks


def read_checkpoint(step_dir: Path, state: dict[str, Tensor]) -> dict[str, Any]:
    """Read the tensors of `state` in place, from a checkpoint of any number of ranks.

    Returns:
        What state.json holds; see `read_about`.

    Raises:
        CheckpointError: damaged, foreign, or of another model.
    """
    about = read_about(step_dir)
    read_tensors(step_dir, state)
    return about


class CheckpointWriter:
    """Writes one checkpoint at a time, in a thread with a process group of its own.

    Args:
        rank, ranks: of the default group; every rank makes a writer, at the same point.
        config: of the run; kept in state.json.
        store: where to; default: where `run.storage` says.
    """

    def __init__(self, rank: int, ranks: int, config: Config, store: Store | None = None) -> None:
        self.rank, self.ranks = rank, ranks
        self._store = store
        self._config = config
        # a frozen rank must not hold the others longer here than it does in a step
        patience = timedelta(seconds=config.cluster.timeout_s)
        self._group = dist.new_group(backend="gloo", timeout=patience) if ranks > 1 else None
        self._thread: Thread | None = None
        self._error: Exception | None = None

    def save(
        self,
        run_dir: Path,
        step: int,
        state: dict[str, Tensor],
        *,
        wait: bool,
        more: dict[str, Any] | None = None,
    ) -> None:
        """Copy the tensors, then write them to run_dir/step_N while training goes on.

        Args:
            more: for state.json, as JSON has it.

        Raises:
            CheckpointError: this write (wait) or the one before it failed.
            WorkerLostError: another rank was lost meanwhile.
        """
        self.wait()
        snapshot = Snapshot(state, self.rank, self.ranks)
        # a daemon: a process that is told to end does not stay for a rank that is gone
        self._thread = Thread(
            target=self._run,
            args=(run_dir, step, snapshot, more or {}),
            name=f"save {step}",
            daemon=True,
        )
        self._thread.start()
        if wait:
            self.wait()

    def wait(self) -> None:
        """Until nothing is being written.

        Raises:
            CheckpointError, WorkerLostError: why the last write failed; said once.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self, run_dir: Path, step: int, snapshot: Snapshot, more: dict[str, Any]) -> None:
        try:
            store = self._store or open_store(self._config, run_dir, self.rank)
            with peers_may_be_lost(f"rank {self.rank}, writing {store.where(step)}"):
                self._write(store, run_dir, step, snapshot, more)
        except Exception as error:  # whatever it is, `wait` raises it in the thread that trains
            self._error = error

    def _write(
        self, store: Store, run_dir: Path, step: int, snapshot: Snapshot, more: dict[str, Any]
    ) -> None:
        config = config_to_dict(self._config)
        about = {"step": step, "ranks": self.ranks, "config": config, **more}
        first = self.rank == 0

        def send() -> None:
            snapshot.write(store.partial(step))
            store.sent(step)

        failed = (
            self._together(lambda: store.begin(step), True)
            or self._together(send, True)
            or self._together(lambda: store.publish(step, about), first)
        )
        if failed is not None:
            # all ranks have stopped writing; after a lost peer nobody knows, and it is left
            store.discard(step)
            raise CheckpointError(self._explain(store, run_dir, step, failed, snapshot.nbytes))
        if first:
            store.prune(self._config.train.keep_checkpoints)

    def _together(self, work: Callable[[], None], mine: bool) -> str | None:
        """Work on some ranks, then agree on all.

        Returns:
            Why it failed on the first rank where it did, None if it did nowhere.
        """
        reason = ""
        if mine:
            try:
                work()
            except Exception as error:  # the other ranks wait for our word, whatever happened
                text = error.strerror if isinstance(error, OSError) else None
                reason = text or f"{type(error).__name__}: {' '.join(str(error).split())}"
        if self._group is None:
            return reason or None
        worst = torch.tensor(self.rank if reason else self.ranks)
        dist.all_reduce(worst, dist.ReduceOp.MIN, group=self._group)
        if worst == self.ranks:
            return None
        # as numbers: objects are pickled when they are sent
        padded = reason.encode()[:_REASON_BYTES].ljust(_REASON_BYTES)
        sent = torch.frombuffer(bytearray(padded), dtype=torch.uint8)
        dist.broadcast(sent, int(worst), group=self._group)
        return f"rank {int(worst)}: {bytes(sent.tolist()).decode(errors='replace').strip()}"

    def _total(self, nbytes: int) -> int:
        total = torch.tensor(nbytes)
        if self._group is not None:
            dist.all_reduce(total, group=self._group)
        return int(total)

    def _explain(self, store: Store, run_dir: Path, step: int, reason: str, nbytes: int) -> str:
        there = next(path for path in (run_dir, *run_dir.parents) if path.exists())
        free, wanted = shutil.disk_usage(there).free, self._total(nbytes)
        try:
            last = store.latest()
            kept = "there is none before it" if last is None else f"{Path(last).name} is kept"
        except CheckpointError:
            kept = "what was there before is kept"
        return (
            f"{store.where(step)}: not written: {reason}; wanted {wanted / 2**20:.1f} MiB, "
            f"{free / 2**20:.1f} MiB are free; {kept}: free some space or set run.dir to another "
            "disk, and run the same command"
        )
