"""Recorded routing without its weights: 2 bytes a choice, all that a replay needs.

safetensors: `step_N`, int16 (L, T, K), tokens in their global order, -1: no row
header: format, version, and what the model is, as JSON
"""

import json
import re
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from moe_router.config import Config
from moe_router.config_file import load_config
from moe_router.cost import cost
from moe_router.errors import DataError
from moe_router.observability.files import write_atomic
from moe_router.observability.trace_data import Trace
from moe_router.observability.trace_file import load_trace

FORMAT, VERSION = "moe_router.recording", "1"
_FILE = re.compile(r"step_(\d+)\.rank_\d+")


@dataclass(frozen=True, slots=True)
class Shape:
    """What of a model its dispatch depends on.

    Attributes:
        itemsize: bytes of an element of a row.
        accumulation: micro-steps in a step, one after another along T.
        dense_bytes: of the gradients that all ranks sum.
    """

    experts: int
    dim: int
    hidden: int
    itemsize: int
    accumulation: int
    dense_bytes: int

    @classmethod
    def of(cls, config: Config) -> "Shape":
        moe = config.model.moe
        if moe is None:
            raise DataError(
                f"{config.run.name}: model.moe=null; want a run whose model has experts"
            )
        parts = cost(config).parts
        dense = sum(part.bytes for part in parts if part.name != "experts")
        itemsize = 2 if config.train.precision == "bf16" else 4
        sizes = (moe.experts, config.model.dim, moe.hidden, itemsize)
        return cls(*sizes, config.train.accumulation, dense)


@dataclass(frozen=True, slots=True)
class Recording:
    """Attributes:
    steps: by number, (L, T, K) int16 experts of every token of all ranks, -1: no row.
    """

    shape: Shape
    steps: dict[int, Tensor]


def load_recording(path: Path) -> Recording:
    """A run that was trained with run.record=true, or a file of `save_recording`.

    Raises:
        DataError: neither, or nothing was recorded.
    """
    if path.is_file():
        return _read(path)
    files: dict[int, list[Path]] = defaultdict(list)
    for file in sorted((path / "routing").glob("*.safetensors")):
        if found := _FILE.fullmatch(file.stem):
            files[int(found[1])].append(file)
    if not files:
        raise DataError(
            f"{path}: no recorded routing (routing/step_N.rank_R.safetensors); train with --set "
            "run.record=true"
        )
    shape = Shape.of(load_config(path / "config.yaml"))
    steps = {step: _together([load_trace(f) for f in files[step]], shape) for step in sorted(files)}
    return Recording(shape, steps)


def save_recording(recording: Recording, path: Path) -> None:
    """Write it in one piece.

    Raises:
        MoeRouterError: the disk refused.
    """
    from safetensors.torch import save

    header = {"format": FORMAT, "version": VERSION, "shape": json.dumps(asdict(recording.shape))}
    tensors = {f"step_{step}": routed.contiguous() for step, routed in recording.steps.items()}
    write_atomic(path, save(tensors, header))


def _read(path: Path) -> Recording:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if (header.get("format"), header.get("version")) != (FORMAT, VERSION):
            raise KeyError("format")
        numbered = {int(name.removeprefix("step_")): tensor for name, tensor in tensors.items()}
        steps = {step: numbered[step] for step in sorted(numbered)}
        return Recording(Shape(**json.loads(header["shape"])), steps)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path}: not a recording of version {VERSION} ({error}); want a run's folder, or what "
            "moe-router simulate --compact wrote"
        ) from error


def _together(traces: list[Trace], shape: Shape) -> Tensor:
    """(L, T, K) of all ranks, in the order of tokens."""
    token_T = torch.cat([trace.token_T for trace in traces])
    order_T = token_T.argsort()
    if not torch.equal(token_T[order_T], torch.arange(len(token_T))):
        raise DataError(
            f"recorded routing: {len(token_T)} tokens that are not 0 to {len(token_T) - 1}; want "
            "the files of all ranks of one step"
        )
    layers = [n for n, held in traces[0].layers.items() if held.groups == shape.experts]
    routed = []
    for layer in layers:
        parts = [trace.layers[layer] for trace in traces]
        target_TK = torch.cat([part.target_TK.masked_fill(~part.kept_TK, -1) for part in parts])
        routed.append(target_TK[order_T].to(torch.int16))
    return torch.stack(routed)
