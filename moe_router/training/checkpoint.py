"""Checkpoints: safetensors and a state.json, written beside the run and put in place whole.

runs/NAME/step_N.tmp is written by all ranks in the background, synced, and renamed to step_N.
Nothing is pickled, and a folder named step_N is always complete.
"""

import json
import os
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from moe_router.config import Config
from moe_router.config_file import config_to_dict
from moe_router.errors import CheckpointError, MoeRouterError, PeerLostError
from moe_router.training.checkpoint_files import (
    VERSION,
    drop_leftovers,
    latest_checkpoint,
    sizes,
    step_folders,
    sync_folder,
)
from moe_router.training.parallel import is_peer_loss

Group = dist.ProcessGroup | None


class CheckpointWriter:
    """Writes one checkpoint at a time, in a thread with a process group of its own.

    Args:
        rank, ranks: of the default group; every rank makes a writer, at the same point.
        config: of the run; kept in state.json.
    """

    def __init__(self, rank: int, ranks: int, config: Config) -> None:
        self.rank, self.ranks = rank, ranks
        self._config = config
        self._group: Group = dist.new_group(backend="gloo") if ranks > 1 else None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, run_dir: Path, step: int, state: dict[str, Tensor], *, wait: bool) -> None:
        """Copy the tensors, then write them while training goes on.

        Raises:
            CheckpointError: this write failed (wait) or the one before did.
            PeerLostError: another rank was lost meanwhile.
        """
        self.wait()
        copies = {name: _snapshot(tensor) for name, tensor in state.items()}
        self._thread = threading.Thread(
            target=self._guarded, args=(run_dir, step, copies), name=f"checkpoint-{step}"
        )
        self._thread.start()
        if wait:
            self.wait()

    def wait(self) -> None:
        """Until nothing is being written. Raises what went wrong."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _guarded(self, run_dir: Path, step: int, state: dict[str, Tensor]) -> None:
        try:
            self._write(run_dir, step, state)
        except MoeRouterError as error:
            self._error = error
        except BaseException as error:
            # CheckpointException is no Exception; the thread must hand everything over
            self._error = _explain(error, run_dir, step)

    def _write(self, run_dir: Path, step: int, state: dict[str, Tensor]) -> None:
        partial = run_dir / f"step_{step}.tmp"
        self._on_rank_0(run_dir, step, lambda: _fresh_folder(partial))
        writer = HuggingFaceStorageWriter(str(partial), save_distributed=True)
        try:
            with _alone():
                save(
                    state,
                    storage_writer=writer,
                    process_group=self._group,
                    no_dist=self.ranks == 1,
                )
        except BaseException:
            if self.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        self._on_rank_0(run_dir, step, lambda: self._commit(partial, run_dir, step))

    def _commit(self, partial: Path, run_dir: Path, step: int) -> None:
        about = {
            "version": VERSION,
            "step": step,
            "ranks": self.ranks,
            "files": sizes(partial),
            "config": config_to_dict(self._config),
        }
        try:
            (partial / "state.json").write_text(json.dumps(about, indent=1))
            sync_folder(partial)
            final = run_dir / f"step_{step}"
            shutil.rmtree(final, ignore_errors=True)  # the same step, replayed after a loss
            os.rename(partial, final)
            sync_folder(run_dir)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        for old in step_folders(run_dir)[: -self._config.train.keep_checkpoints]:
            shutil.rmtree(old)

    def _on_rank_0(self, run_dir: Path, step: int, work: Callable[[], None]) -> None:
        """Rank 0 works, the others wait for it and learn whether it failed."""
        error: BaseException | None = None
        if self.rank == 0:
            try:
                work()
            except OSError as failed:
                error = failed
        if self.ranks > 1:
            flag = torch.tensor([int(error is not None)])
            dist.broadcast(flag, 0, group=self._group)
            if flag.item() and error is None:
                raise CheckpointError(f"{run_dir}/step_{step}: rank 0 could not write it")
        if error is not None:
            raise error


def restore(step_dir: Path, state: dict[str, Tensor], *, rank: int, ranks: int) -> dict[str, Any]:
    """Read the tensors of `state` in place, from a checkpoint of any number of ranks.

    Returns:
        What state.json holds.

    Raises:
        CheckpointError: truncated, foreign, or of another model.
    """
    about = read_about(step_dir)
    reader = HuggingFaceStorageReader(str(step_dir))
    _require_tensors(step_dir, reader, state)
    try:
        with _alone():
            load(state, storage_reader=reader, no_dist=ranks == 1)
    except (CheckpointException, OSError, ValueError) as error:
        raise _explain(error, step_dir.parent, about["step"]) from None
    if rank == 0:
        drop_leftovers(step_dir.parent)
    return about


def read_about(step_dir: Path) -> dict[str, Any]:
    """state.json, checked against the files that lie beside it."""
    path = step_dir / "state.json"
    if not path.is_file():
        raise CheckpointError(
            f"{step_dir}: no state.json, so this is no checkpoint of moe_router; want a step_N "
            "folder of a run"
        )
    try:
        about: dict[str, Any] = json.loads(path.read_text())
        version, files = about["version"], about["files"]
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{path}: not a state.json of moe_router") from None
    if version != VERSION:
        raise CheckpointError(f"{path}: version {version}, want {VERSION}: use a newer moe_router")
    have = sizes(step_dir)
    for name, size in files.items():
        if have.get(name) != size:
            raise CheckpointError(
                f"{step_dir / name}: {have.get(name, 'no')} bytes, want {size}: the checkpoint is "
                "truncated; resume from another step_N folder"
            )
    return about


def _require_tensors(
    step_dir: Path, reader: HuggingFaceStorageReader, state: dict[str, Tensor]
) -> None:
    try:
        saved = reader.read_metadata().state_dict_metadata
    except Exception as error:
        # safetensors has an error class of its own for each release
        raise CheckpointError(f"{step_dir}: not safetensors: {error}") from None
    for name, tensor in state.items():
        if name not in saved:
            raise CheckpointError(
                f"{step_dir}: no tensor {name}: it was written by another model; use its config"
            )
        size = getattr(saved[name], "size", None)
        if size != tensor.size():
            raise CheckpointError(
                f"{step_dir}: {name} is {list(size or [])}, want {list(tensor.size())}: the model "
                "differs; use the config of the run that wrote it"
            )


@contextmanager
def _alone() -> Iterator[None]:
    """One rank needs no process group; torch warns about that."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _snapshot(tensor: Tensor) -> Tensor:
    """A copy that training cannot change; on the host, unless it is a shard."""
    if isinstance(tensor, DTensor):
        return tensor.detach().clone()
    return tensor.detach().to("cpu", copy=True).contiguous()


def _fresh_folder(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)


def _explain(error: BaseException, run_dir: Path, step: int) -> MoeRouterError:
    """One line about a failed write or read."""
    causes = [error]
    if isinstance(error, CheckpointException):
        causes = [exc for exc, _ in error.failures.values()]
    if any(is_peer_loss(cause) for cause in causes):
        return PeerLostError(f"{run_dir}/step_{step}: a rank was lost while it was written")
    cause = str(causes[0]).splitlines()[0] if str(causes[0]) else type(causes[0]).__name__
    last = latest_checkpoint(run_dir)
    kept = f"{last.name} is kept" if last else "there is none before it"
    free = shutil.disk_usage(run_dir).free >> 20 if run_dir.exists() else 0
    return CheckpointError(
        f"{run_dir}/step_{step}: not written: {cause} ({free} MiB free); {kept}: free some space "
        "and run the same command, it goes on from there"
    )
