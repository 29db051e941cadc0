"""The tensors of a checkpoint: a safetensors file per rank, written and read through torch's
distributed checkpoint, which joins shards to whole tensors and cuts them anew.

Ranks do not talk here: each writes what it alone holds, and its share of what all hold alike.
"""

from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.tensor import DTensor

from moe_router.errors import CheckpointError
from moe_router.training.state import OPTIMIZER, any_expert


class Snapshot:
    """Copies, on the host, of what this rank writes: training may go on.

    Args:
        state: name to tensor: the experts of this rank, shards (DTensor), and what every rank
            holds alike.
        rank, ranks: of those who write.
    """

    def __init__(self, state: dict[str, Tensor], rank: int, ranks: int) -> None:
        self._rank = rank
        mine = _share(state, rank, ranks)
        self._copies = {
            name: _local(tensor).to("cpu", copy=True).contiguous() for name, tensor in mine.items()
        }
        self._planner = _CopyPlanner(self._copies)
        self._planner.set_up_planner(mine)
        # where a shard lies in its tensor is read off the live one, now
        self._plan = self._planner.create_local_plan()

    @property
    def nbytes(self) -> int:
        return sum(copy.nbytes for copy in self._copies.values())

    def write(self, folder: Path) -> None:
        """Write and sync this rank's file.

        Raises:
            OSError: the disk refused.
        """
        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        writer.set_up_storage_writer(is_coordinator=True)
        # a file is called by the place of its plan among those of all ranks
        plans = [SavePlan([])] * self._rank + [writer.prepare_local_plan(self._plan)]
        plan = self._planner.finish_plan(writer.prepare_global_plan(plans)[self._rank])
        writer.write_data(plan, self._planner).wait()


class _CopyPlanner(DefaultSavePlanner):
    """Plans by the live tensors, writes their copies."""

    def __init__(self, copies: dict[str, Tensor]) -> None:
        super().__init__(flatten_state_dict=False)
        self._copies = copies

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self._copies[index.fqn]


def read_tensors(folder: Path, state: dict[str, Tensor]) -> None:
    """Fill the tensors of `state` in place. Nothing is changed if names or shapes differ.

    Args:
        state: name to tensor, view or DTensor; without the optimizer's, those stay unread.

    Raises:
        CheckpointError: a file is damaged, or its tensors are those of another model.
    """
    reader = HuggingFaceStorageReader(str(folder))
    try:
        metadata = reader.read_metadata()
        _require_same_model(folder, metadata, state)
        reader.set_up_storage_reader(metadata, is_coordinator=True)
        planner = DefaultLoadPlanner(flatten_state_dict=False)
        planner.set_up_planner(state, metadata, is_coordinator=True)
        reader.read_data(reader.prepare_local_plan(planner.create_local_plan()), planner).wait()
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        # a header may be JSON and nonsense, so torch stumbles in many ways
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{folder}: not safetensors: {reason}; go on from another step_N folder of the run"
        ) from error


def saved_names(folder: Path) -> set[str]:
    """Of the tensors in a checkpoint. Raises CheckpointError: it is damaged."""
    try:
        return set(HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder}: not safetensors: {' '.join(str(error).split())}"
        ) from error


def _require_same_model(folder: Path, metadata: Metadata, state: dict[str, Tensor]) -> None:
    fix = "take the config of the run that wrote it, or another run.name"
    saved = metadata.state_dict_metadata
    for name, tensor in state.items():
        if name not in saved:
            raise CheckpointError(f"{folder}: no tensor {name}, which this model has; {fix}")
        size = getattr(saved[name], "size", ())
        if tuple(size) != tuple(tensor.shape):
            raise CheckpointError(
                f"{folder}: {name} is {list(size)}, want {list(tensor.shape)}: the model differs; "
                f"{fix}"
            )
    # other ranks ask for the experts that we do not
    known = {any_expert(name) for name in state}
    with_optimizer = any(name.startswith(OPTIMIZER) for name in state)
    for name in sorted(saved):
        asked = with_optimizer or not name.startswith(OPTIMIZER)
        if asked and any_expert(name) not in known:
            raise CheckpointError(f"{folder}: has {name}, which this model has not; {fix}")


def _share(state: dict[str, Tensor], rank: int, ranks: int) -> dict[str, Tensor]:
    """What this rank writes: all that it alone holds, every `ranks`-th of what all hold."""
    alike = [name for name, t in state.items() if not _is_apart(name, t)]
    others = {name for i, name in enumerate(alike) if i % ranks != rank}
    return {name: tensor for name, tensor in state.items() if name not in others}


def _is_apart(name: str, tensor: Tensor) -> bool:
    return isinstance(tensor, DTensor) or any_expert(name) != name


def _local(tensor: Tensor) -> Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
