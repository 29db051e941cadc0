"""Reading and writing plain files: find, map, unpack, replace. Knows nothing of tokens.

A plain file of a megabyte or more is memory-mapped, never read whole. Compressed files are told
by their first bytes, not by their name.
"""

import codecs
import difflib
import glob
import gzip
import io
import lzma
import os
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from moe_router.errors import DataError

Text = NDArray[np.uint8]  # the bytes of one document

_CHUNK = 1 << 20  # bytes read at a time; also the size from which a file is mapped
_PACKED = (".xz", ".gz", ".zip")
_BAD_ARCHIVE = (lzma.LZMAError, zipfile.BadZipFile, zlib.error, EOFError)
_WILD = set("*?[")


def near(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for a misspelt name, else nothing."""
    match = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {match[0]!r}?" if match else ""


def expand(path: str, suffixes: tuple[str, ...], key: str = "data.path") -> list[Path]:
    """The files a `data.path` names, sorted.

    Args:
        path: a file, a folder (searched in depth for `suffixes`, hidden names left out) or a glob.
        suffixes: endings such as ".txt", looked at after a compression suffix is taken off.
        key: of the config that holds the path, named in errors.

    Raises:
        DataError: nothing is there.
    """
    root = Path(path).expanduser()
    if root.is_file():
        return [root]
    if root.is_dir():
        found = sorted(p for p in root.rglob("*") if p.is_file() and _wanted(p, root, suffixes))
        if not found:
            raise DataError(f"{key}={path}: no file ends in {', '.join(suffixes)} in there")
        return found
    if _WILD & set(path):
        found = sorted(p for p in map(Path, glob.glob(str(root), recursive=True)) if p.is_file())
        if not found:
            raise DataError(f"{key}={path}: no file matches, want at least one")
        return found
    siblings = [p.name for p in root.parent.iterdir()] if root.parent.is_dir() else []
    raise DataError(
        f"{key}={path}: no such file, want a file, a folder or a glob" + near(root.name, siblings)
    )


def _wanted(path: Path, root: Path, suffixes: tuple[str, ...]) -> bool:
    if any(part.startswith(".") for part in path.relative_to(root).parts):
        return False
    plain = path.with_suffix("") if path.suffix in _PACKED else path
    return plain.suffix.lower() in suffixes


@contextmanager
def open_content(path: Path) -> Iterator[BinaryIO]:
    """The content of a plain, .xz, .gz or single-member .zip file, as a binary stream.

    Raises:
        DataError: it cannot be opened, or its packing is damaged, also while it is being read.
    """
    try:
        with path.open("rb") as raw, unpacked(raw) as stream:
            yield stream
    except _BAD_ARCHIVE as error:
        raise DataError(f"{path}: the archive is damaged ({error}), want a whole file") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


@contextmanager
def unpacked(raw: BinaryIO) -> Iterator[BinaryIO]:
    """Look at the first bytes of a seekable stream and undo its compression, if any."""
    magic = raw.read(6)
    raw.seek(0)
    if magic == b"\xfd7zXZ\x00":
        with lzma.open(raw) as stream:
            yield cast(BinaryIO, stream)
    elif magic[:2] == b"\x1f\x8b":
        with gzip.open(raw) as stream:
            yield cast(BinaryIO, stream)
    elif magic[:4] == b"PK\x03\x04":
        with zipfile.ZipFile(raw) as archive:
            members = [m for m in archive.namelist() if not m.endswith("/")]
            if len(members) != 1:
                raise zipfile.BadZipFile(f"{len(members)} members, want one")
            with archive.open(members[0]) as stream:
                yield cast(BinaryIO, stream)
    else:
        yield raw


def read_content(path: Path, limit: int | None = None) -> Text:
    """All bytes of a file: mapped if it is plain and large, unpacked into memory if compressed.

    Args:
        limit: stop soon after this many bytes, for a file whose size is known in advance.
    """
    with open_content(path) as stream:
        # Only the plain file itself is a BufferedReader; the unpackers are classes of their own.
        if isinstance(stream, io.BufferedReader) and path.stat().st_size >= _CHUNK:
            return np.memmap(path, np.uint8, "r")
        return drain(stream, limit)


def drain(stream: BinaryIO, limit: int | None = None) -> Text:
    """Read a stream to its end, or until `limit` is passed, with one growing buffer."""
    content = bytearray()
    while (limit is None or len(content) <= limit) and (chunk := stream.read(_CHUNK)):
        content += chunk
    return np.frombuffer(content, np.uint8) if content else np.zeros(0, np.uint8)


def check_utf8(text: Text, where: str) -> None:
    """Refuse bytes that are not UTF-8, a window at a time.

    Raises:
        DataError: with the offset of the first bad byte.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    for start in range(0, len(text), _CHUNK):
        held = len(decoder.getstate()[0])  # the head of a character cut by the window before
        window = text[start : start + _CHUNK].tobytes()
        try:
            decoder.decode(window, final=start + _CHUNK >= len(text))
        except UnicodeDecodeError as error:
            at = start - held + error.start
            raise DataError(
                f"{where}: byte 0x{text[at]:02x} at offset {at} is not UTF-8, want UTF-8 text; "
                "convert it, for example by `iconv -f latin1 -t utf-8`"
            ) from error


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Write a file that appears whole or not at all: temporary file, fsync, rename.

    Raises:
        DataError: the folder cannot be written, or the disk is full.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o644)  # mkstemp makes it private; a shared cache is read by others
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename itself must survive a power cut
        finally:
            os.close(folder)
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"{path}: cannot be written ({reason}); free space or move it") from error
