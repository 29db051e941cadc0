"""Labelled documents: one text and one label each, cut at seq_len tokens, never padded."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from moe_router.config import DataConfig
from moe_router.errors import DataError
from moe_router.training.data.batch import Batch
from moe_router.training.data.files import expand, near
from moe_router.training.data.labelled_files import labelled_rows
from moe_router.training.data.permutation import permute
from moe_router.training.data.sources import utf8
from moe_router.training.data.tokenizer import Tokenizer, load_tokenizer

_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".txt")


@dataclass(frozen=True, slots=True)
class Documents:
    """Token ids end to end.

    Attributes:
        ids: of all documents, each after its separator.
        offsets_N1: int64, document n is ids[offsets[n] : offsets[n + 1]].
        label_N: int64.
    """

    ids: NDArray[np.int32]
    offsets_N1: NDArray[np.int64]
    label_N: NDArray[np.int64]
    noun: ClassVar[str] = "documents"

    @property
    def rows(self) -> int:
        return len(self.label_N)


@dataclass(frozen=True, slots=True)
class LabelledDataset:
    """Attributes:
    train, val: documents by index; `val` is held out.
    tokenizer: made the ids.
    labels: names, in order of their ids.
    """

    train: Documents
    val: Documents
    tokenizer: Tokenizer
    labels: tuple[str, ...]

    @property
    def vocab(self) -> int:
        """Token ids."""
        return self.tokenizer.vocab


def load_labelled(config: DataConfig) -> LabelledDataset:
    """Read, tokenise and split what `config` names. The same config gives the same dataset.

    Raises:
        DataError: a file is missing, empty, damaged, or holds a label that data.labels does not.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    assert config.path is not None
    train = _read(config.path, "data.path", config, tokenizer)
    if config.val_path is not None:
        val = _read(config.val_path, "data.val_path", config, tokenizer)
    else:
        is_val_N = held_out(train.rows, config, Documents.noun)
        train, val = (_some(train, np.flatnonzero(mask)) for mask in (~is_val_N, is_val_N))
    # the first train.eval_rows are measured: files are often sorted by label
    val = _some(val, permute(np.arange(val.rows), val.rows, seed=0, epoch=0))
    return LabelledDataset(train, val, tokenizer, config.labels)


def held_out(rows: int, config: DataConfig, noun: str) -> NDArray[np.bool_]:
    """(rows,) which ones are held out: every n-th, not the last, for files are often sorted by
    label.

    Raises:
        DataError: too few rows to hold out data.val_fraction of them.
    """
    count = round(config.val_fraction * rows)
    if not 0 < count < rows:
        raise DataError(
            f"data.path={config.path}: {rows} {noun}, want enough to hold out "
            f"data.val_fraction={config.val_fraction} of them; add some, or set data.val_path"
        )
    spread: NDArray[np.bool_] = np.diff(np.arange(rows + 1) * count // rows) > 0
    return spread


def texts_of(config: DataConfig) -> Iterator[str]:
    """The texts of data.path, without their labels. Raises DataError."""
    assert config.path is not None
    for file in expand(config.path, _SUFFIXES):
        for _, _, text in labelled_rows(file, config):
            yield text


def pack_documents(documents: Documents, index_N: NDArray[np.int64], mine: slice) -> Batch:
    """One rank's documents, index[mine], of a micro-batch of all ranks, as flat tensors."""
    length_N = documents.offsets_N1[index_N + 1] - documents.offsets_N1[index_N]
    ours = _some(documents, index_N[mine])
    lengths = np.diff(ours.offsets_N1)
    position_T = np.arange(len(ours.ids)) - np.repeat(ours.offsets_N1[:-1], lengths)
    return Batch(
        ids_T=torch.from_numpy(ours.ids.astype(np.int64)),
        target_N=torch.from_numpy(ours.label_N),
        position_T=torch.from_numpy(position_T.astype(np.int32)),
        offsets_B1=torch.from_numpy(ours.offsets_N1.astype(np.int32)),
        first_token=int(length_N[: mine.start].sum()),
        tokens=int(length_N.sum()),
        targets=len(index_N),
    )


def _some(documents: Documents, index_N: NDArray[np.int64]) -> Documents:
    bounds = documents.offsets_N1
    parts = [documents.ids[bounds[n] : bounds[n + 1]] for n in index_N.tolist()]
    offsets = np.array([0, *accumulate(map(len, parts))], np.int64)
    ids = np.concatenate(parts) if parts else documents.ids[:0]
    return Documents(ids, offsets, documents.label_N[index_N])


def _read(path: str, key: str, config: DataConfig, tokenizer: Tokenizer) -> Documents:
    parts, labels = [], []
    known = {name: i for i, name in enumerate(config.labels)}
    for file in expand(path, _SUFFIXES, key):
        for where, label, text in labelled_rows(file, config):
            if label not in known:
                raise DataError(
                    f"{where}: label {label!r}, want one of data.labels: {', '.join(known)}"
                    + near(label, known)
                )
            utf8(text, where)  # JSON can name half of a surrogate pair
            ids = [tokenizer.document_id, *tokenizer.encode(text)]
            if len(ids) == 1:
                raise DataError(f"{where}: an empty text, want at least one token; leave it out")
            parts.append(np.array(ids[: config.seq_len], np.int32))
            labels.append(known[label])
    if not parts:
        raise DataError(f"{key}={path}: is empty, want labelled text in it")
    offsets = np.array([0, *accumulate(map(len, parts))], np.int64)
    return Documents(np.concatenate(parts), offsets, np.array(labels, np.int64))
