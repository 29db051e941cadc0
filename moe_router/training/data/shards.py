"""Token shards: text that was tokenised once, memory-mapped, never loaded whole.

A shard is one array of uint16 or uint32 ids, each document after a `document_id`:

    NAME.npy   a one-dimensional NumPy array; its header says type and length
    NAME.bin   the same ids without a header, little-endian; needs its sidecar

The sidecar NAME.npy.json or NAME.bin.json (optional for .npy) is one JSON object:

    {"format": "moe-router-shard", "version": 1, "dtype": "uint16", "tokens": 1000,
     "documents": 10, "document_id": 256, "vocab": 257}
"""

import json
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_router.errors import DataError
from moe_router.training.data.files import expand, replacing
from moe_router.training.data.stream import Segments, TokenArray
from moe_router.training.data.tokenizer import Tokenizer

SUFFIXES = (".npy", ".bin")
_FORMAT = "moe-router-shard"
_TYPES = ("uint16", "uint32")
_NEAR_CUT = 1 << 22  # tokens searched on each side for the end of a document


def write_shard(
    path: Path | str,
    documents: Iterable[Sequence[int] | NDArray[Any]],
    *,
    document_id: int,
    vocab: int,
) -> int:
    """Write one shard and its sidecar, a document at a time.

    Args:
        path: ends in .npy or .bin; replaced whole, or not at all.
        documents: ids of each, without separators.
        document_id, vocab: the tokenizer's; ids are uint16 for a vocab up to 65536, else uint32.

    Returns:
        How many tokens the shard has, separators among them.

    Raises:
        DataError: an id outside the vocabulary, another suffix, or a disk that refuses.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path}: a shard ends in .npy or .bin")
    dtype = np.dtype("<u2" if vocab <= 1 << 16 else "<u4")
    tokens = count = 0
    with replacing(path) as out:
        if path.suffix == ".npy":
            out.write(_npy_header(dtype, 0))
        for count, document in enumerate(documents, 1):
            ids_N = np.concatenate(([document_id], np.asarray(document, np.int64)))
            if not 0 <= int(ids_N.min()) <= int(ids_N.max()) < vocab:
                raise DataError(f"{path}: document {count} has ids outside 0..{vocab - 1} (vocab)")
            out.write(ids_N.astype(dtype).tobytes())
            tokens += len(ids_N)
        if path.suffix == ".npy":
            out.seek(0)
            out.write(_npy_header(dtype, tokens))
    note = {"dtype": dtype.name, "tokens": tokens, "documents": count}
    _write_sidecar(path, note | {"document_id": document_id, "vocab": vocab})
    return tokens


def open_shards(path: str, tokenizer: Tokenizer, val_fraction: float) -> tuple[Segments, Segments]:
    """Map the shards a path names, sorted by name, and split them.

    The held-out part is the last documents: the cut is the start of a document nearest to
    `val_fraction` of the tokens from the end, or that very token if no document starts near.

    Args:
        path: a file, a folder or a glob.
        tokenizer: whose ids they hold.
        val_fraction: of the tokens.

    Returns:
        Training and held-out tokens, both still mapped.

    Raises:
        DataError: a shard is missing, empty, damaged, or of another tokenizer.
    """
    files = [p for p in expand(path, SUFFIXES) if p.suffix != ".json"]  # a glob finds sidecars too
    line = Segments([_open(p, tokenizer) for p in files])
    cut = round(len(line) * (1 - val_fraction))
    start, stop = max(1, cut - _NEAR_CUT), min(len(line), cut + _NEAR_CUT)
    found: list[int] = []
    for piece in line.pieces(start, stop):
        found += (np.flatnonzero(piece == tokenizer.document_id) + start).tolist()
        start += len(piece)
    cut = min(found, key=lambda at: abs(at - cut), default=cut)
    return line.cut(0, cut), line.cut(cut, len(line))


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _write_sidecar(path: Path, note: dict[str, Any]) -> None:
    with replacing(_sidecar(path)) as out:
        out.write((json.dumps({"format": _FORMAT, "version": 1} | note) + "\n").encode())


def _npy_header(dtype: np.dtype[Any], tokens: int) -> bytes:
    """128 bytes for any length, so that it can be written again once the length is known.

    Source: the NPY format, version 1.0, in NumPy's reference (`numpy.lib.format`).
    """
    text = f"{{'descr': {dtype.str!r}, 'fortran_order': False, 'shape': ({tokens},), }}"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", 118) + text.ljust(117).encode() + b"\n"


def _open(path: Path, tokenizer: Tokenizer) -> TokenArray:
    note = _read_sidecar(path)
    if note is None and path.suffix != ".npy":
        raise DataError(
            f"{path}: no {_sidecar(path).name} beside it, want the sidecar that says its dtype; "
            "write_shard makes both"
        )
    for key in ("document_id", "vocab"):
        if note is not None and note.get(key) != getattr(tokenizer, key):
            raise DataError(
                f"{_sidecar(path)}: {key} is {note.get(key)}, want {getattr(tokenizer, key)}, "
                "that of data.tokenizer; name the tokenizer that made this shard"
            )
    array = _map_npy(path) if path.suffix == ".npy" else _map_bin(path, note or {})
    if note is not None and note.get("tokens") != len(array):
        raise DataError(
            f"{path}: {len(array)} tokens, want {note.get('tokens')} by its sidecar; "
            "the shard is truncated or foreign: write it again"
        )
    if len(array) == 0:
        raise DataError(f"{path}: has no tokens, want at least one document")
    return array


def _read_sidecar(path: Path) -> dict[str, Any] | None:
    side = _sidecar(path)
    if not side.exists():
        return None
    try:
        note = json.loads(side.read_bytes())
    except (ValueError, OSError) as error:
        raise DataError(f"{side}: not JSON ({error}), want a shard's sidecar") from error
    if not isinstance(note, dict) or note.get("format") != _FORMAT or note.get("version") != 1:
        raise DataError(f'{side}: want "format": "{_FORMAT}" and "version": 1')
    return note


def _map_npy(path: Path) -> TokenArray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"{path}: not a whole .npy file ({error}); write it again") from error
    if not isinstance(array, np.ndarray) or array.ndim != 1 or array.dtype.name not in _TYPES:
        got = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else "an archive"
        raise DataError(f"{path}: holds {got}, want one dimension of uint16 or uint32")
    return array


def _map_bin(path: Path, note: dict[str, Any]) -> TokenArray:
    if note.get("dtype") not in _TYPES:
        raise DataError(f"{_sidecar(path)}: dtype is {note.get('dtype')}, want uint16 or uint32")
    dtype = np.dtype(note["dtype"]).newbyteorder("<")
    size = path.stat().st_size
    if size == 0:
        raise DataError(f"{path}: is empty, want at least one document")
    return np.memmap(path, dtype, "r", shape=(size // dtype.itemsize,))
