"""Routing traces on disk: safetensors, plain arrays and a JSON header; nothing runs when read.

Tensors: token_T, ids_T, position_T, and for each layer L: layers.L.target_TK, .weight_TK, .kept_TK.
Header: format, version, and `layers`, a JSON object from layer index to its number of groups.
"""

import csv
import io
import json
from pathlib import Path

from torch import Tensor

from moe_router.errors import DataError
from moe_router.observability.files import write_atomic
from moe_router.observability.trace_data import LayerTrace, Trace

FORMAT = "moe_router.trace"
VERSION = "1"
_PARTS = ("target_TK", "weight_TK", "kept_TK")


def save_trace(trace: Trace, path: Path | str) -> None:
    """Write a trace in one piece.

    Raises:
        MoeRouterError: the disk refused.
    """
    from safetensors.torch import save

    tensors = {"token_T": trace.token_T, "ids_T": trace.ids_T, "position_T": trace.position_T}
    for layer, held in trace.layers.items():
        tensors |= {f"layers.{layer}.{part}": getattr(held, part) for part in _PARTS}
    groups = {str(layer): held.groups for layer, held in trace.layers.items()}
    header = {"format": FORMAT, "version": VERSION, "layers": json.dumps(groups)}
    # a fresh copy of each: safetensors refuses tensors that share memory
    write_atomic(Path(path), save({n: t.clone().contiguous() for n, t in tensors.items()}, header))


def load_trace(path: Path | str) -> Trace:
    """Read what `Recorder.save` or `save_trace` wrote.

    Raises:
        DataError: no such file, truncated, or not a trace of this version.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise DataError(
            f"{path}: no such file; want a routing trace: train or generate with run.record=true"
        )
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise DataError(
            f"{path}: not a whole safetensors file ({error}); want a routing trace: record it again"
        ) from error
    return _assemble(path, header, tensors)


def _assemble(path: Path, header: dict[str, str], tensors: dict[str, Tensor]) -> Trace:
    got = (header.get("format"), header.get("version"))
    if got != (FORMAT, VERSION):
        raise DataError(
            f"{path}: format {got[0]} version {got[1]}; want {FORMAT} version {VERSION}: "
            "record it again with this moe_router"
        )
    try:
        layers = {
            int(layer): LayerTrace(groups, *(tensors[f"layers.{layer}.{p}"] for p in _PARTS))
            for layer, groups in json.loads(header["layers"]).items()
        }
        return Trace(tensors["token_T"], tensors["ids_T"], tensors["position_T"], layers)
    except (KeyError, ValueError) as error:
        raise DataError(
            f"{path}: the header and the tensors disagree ({error}); want a whole routing trace: "
            "record it again"
        ) from error


def export_csv(trace: Trace, path: Path | str) -> Path:
    """Write a trace as a table: one line for each token, layer and choice.

    Columns: token, id, position, layer, choice (0 is the router's first), group, weight,
    dropped (0 or 1).

    Raises:
        MoeRouterError: the disk refused.
    """
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    table.writerow(["token", "id", "position", "layer", "choice", "group", "weight", "dropped"])
    for row in trace.rows():
        choices = zip(row.groups, row.weights, row.drops, strict=True)
        for k, (group, weight, drop) in enumerate(choices):
            start = [row.token, row.id, row.position, row.layer, k]
            table.writerow([*start, group, f"{weight:.6g}", int(drop)])
    write_atomic(Path(path), out.getvalue().encode())
    return Path(path)
