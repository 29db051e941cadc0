"""Tensors in the files of a model of transformers: model.safetensors, or its shards."""

import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from safetensors import SafetensorError, safe_open
from torch import Tensor

from moe_router.errors import CheckpointError

INDEX, WEIGHTS = "model.safetensors.index.json", "model.safetensors"
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class Files:
    """The tensors of a folder. A file is opened once, and mapped: what nobody copies is not read.

    Raises:
        CheckpointError: there are no such files.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: dict[Path, Any] = {}
        self._close = ExitStack()
        self._file_of = self._found()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._close.close()
        self._open.clear()

    def copy_into(self, name: str, places: Sequence[Tensor]) -> None:
        """One tensor, read once, into each of the places.

        Of those with a row for each id of the vocabulary, as many rows as a place has.

        Raises:
            CheckpointError: it is missing, of another shape, or damaged.
        """
        if name not in self._file_of:
            raise CheckpointError(
                f"{self._folder}: no tensor {name}, which this model has; take its config"
            )
        path, wanted = self._file_of[name], list(places[0].shape)
        try:
            part = self._opened(path).get_slice(name)
            shape = list(part.get_shape())
            padded = name in (EMBEDDINGS, HEAD) and shape[1:] == wanted[1:] and shape >= wanted
            if shape != wanted and not padded:
                raise CheckpointError(f"{path}: {name} is {shape}, want {wanted}")
            found = part[: wanted[0]]
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: {error}") from None
        for into in places:
            into.copy_(found)

    def _found(self) -> dict[str, Path]:
        """Tensor name to the file that holds it."""
        index, path = self._folder / INDEX, self._folder / WEIGHTS
        try:
            if index.is_file():
                table = json.loads(index.read_text("utf-8"))["weight_map"]
                return {name: self._folder / Path(file).name for name, file in table.items()}
            return dict.fromkeys(self._opened(path).keys(), path)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{self._folder}: {error}; want {WEIGHTS} or {INDEX}") from None

    def _opened(self, path: Path) -> Any:
        if path not in self._open:
            self._open[path] = self._close.enter_context(safe_open(path, framework="pt"))
        return self._open[path]
