"""Tensors in the files of a model of transformers: model.safetensors, or its shards."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from moe_router.errors import CheckpointError

INDEX, WEIGHTS = "model.safetensors.index.json", "model.safetensors"
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def files_of(folder: Path) -> dict[str, Path]:
    """Tensor name to the file that holds it."""
    index, path = folder / INDEX, folder / WEIGHTS
    try:
        if index.is_file():
            table = json.loads(index.read_text("utf-8"))["weight_map"]
            return {name: folder / Path(file).name for name, file in table.items()}
        with safe_open(path, framework="pt") as file:
            return dict.fromkeys(file.keys(), path)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder}: {error}; want {WEIGHTS} or {INDEX}") from None


def copy_into(folder: Path, files: dict[str, Path], name: str, into: Tensor) -> None:
    """One tensor; of those with a row for each id of the vocabulary, as many rows as there are.

    Raises:
        CheckpointError: it is missing, of another shape, or damaged.
    """
    if name not in files:
        raise CheckpointError(f"{folder}: no tensor {name}, which this model has; take its config")
    try:
        with safe_open(files[name], framework="pt") as file:
            found = file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{files[name]}: {error}") from None
    if name in (EMBEDDINGS, HEAD):
        found = found[: into.size(0)]  # theirs may be padded
    if found.shape != into.shape:
        raise CheckpointError(
            f"{files[name]}: {name} is {list(found.shape)}, want {list(into.shape)}"
        )
    into.copy_(found)
