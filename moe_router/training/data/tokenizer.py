"""Text to token ids and back: raw bytes, or a `tokenizer.json` of the tokenizers library."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from moe_router.errors import DataError
from moe_router.training.data.files import near

if TYPE_CHECKING:
    from tokenizers import Tokenizer as LibraryTokenizer

# Ends of text first: they are what a model is trained to see between documents.
_SEPARATORS: tuple[str, ...] = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "[EOS]",
)
_SEPARATORS += ("<|begin_of_text|>", "<s>", "<bos>", "<|bos|>", "[BOS]", "[SEP]", "[CLS]")


class Tokenizer(Protocol):
    """What training and generation need of a tokenizer.

    Attributes:
        vocab: number of ids, the separator among them.
        document_id: the separator, which starts each document of a stream.
        bytes_of: (vocab,) int64, how many bytes of text each token stands for; 0 for the separator.
    """

    vocab: int
    document_id: int
    bytes_of: NDArray[np.int64]

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without a separator."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; separators stand for nothing."""
        ...


class ByteTokenizer:
    """One id per UTF-8 byte, 0..255; 256 separates documents."""

    vocab = 257
    document_id = 256

    def __init__(self) -> None:
        self.bytes_of: NDArray[np.int64] = np.ones(self.vocab, np.int64)
        self.bytes_of[self.document_id] = 0

    def encode(self, text: str) -> list[int]:
        """The UTF-8 bytes of a text."""
        return list(text.encode("utf-8"))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of bytes; those that are not UTF-8 become U+FFFD."""
        return bytes(i for i in ids if i != self.document_id).decode("utf-8", errors="replace")


class FileTokenizer:
    """A `tokenizer.json`. Special tokens written out in a text are plain text to it.

    The separator is the file's end-of-text token, else its begin-of-text token, else a new id at
    the end of the vocabulary.

    Attributes:
        path: of the file.
        special: texts of its special tokens.
    """

    def __init__(self, path: Path) -> None:
        """
        Args:
            path: of the tokenizer.json.

        Raises:
            DataError: it is missing or not a tokenizer.
        """
        self.path = path
        self._library = _open(path)
        self._library.encode_special_tokens = True
        self._library.no_truncation()
        self._library.no_padding()
        spec = json.loads(self._library.to_str())
        added = {token["content"]: token for token in spec["added_tokens"]}
        known = self._library.get_vocab(with_added_tokens=True)
        self.special = tuple(name for name, token in added.items() if token["special"])
        self.vocab = max(known.values()) + 1
        self.document_id = _separator(known, added)
        if self.document_id < 0:
            self.document_id, self.vocab = self.vocab, self.vocab + 1
        self.bytes_of = _bytes_of(known, added, spec, self.vocab)
        self.bytes_of[self.document_id] = 0

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without special tokens."""
        ids: list[int] = self._library.encode(text, add_special_tokens=False).ids
        return ids

    def encode_special(self, text: str) -> list[int]:
        """The ids of a text that a template wrote: special tokens in it are what they say."""
        self._library.encode_special_tokens = False
        try:
            return self.encode(text)
        finally:
            self._library.encode_special_tokens = True

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, by the file's own decoder."""
        plain = [int(i) for i in ids if i != self.document_id]
        text: str = self._library.decode(plain, skip_special_tokens=False)
        return text


def load_tokenizer(spec: str) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names.

    Args:
        spec: "bytes", or the path of a tokenizer.json.

    Raises:
        DataError: the file is missing or not a tokenizer.
    """
    return ByteTokenizer() if spec == "bytes" else FileTokenizer(Path(spec).expanduser())


def _open(path: Path) -> "LibraryTokenizer":
    if not path.is_file():
        raise DataError(
            f"data.tokenizer={path}: no such file, want bytes or the path of a tokenizer.json"
            + near(str(path), ["bytes"])
        )
    from tokenizers import Tokenizer as LibraryTokenizer  # the byte path does without it

    try:
        return LibraryTokenizer.from_str(path.read_text("utf-8"))
    except Exception as error:  # the library raises bare Exception for a file it cannot parse
        raise DataError(
            f"data.tokenizer={path}: not a tokenizer ({error}), want a tokenizer.json"
        ) from error


def _separator(known: dict[str, int], added: dict[str, dict[str, Any]]) -> int:
    """The id of the first known separator, -1 if there is none."""
    for name in _SEPARATORS:
        # "</s>" may be a piece of markup that the merges can build; only a special token never is.
        special = name in added and added[name]["special"]
        if name in known and (special or name == "<|endoftext|>"):
            return known[name]
    return -1


def _bytes_of(
    known: dict[str, int], added: dict[str, dict[str, Any]], spec: dict[str, Any], vocab: int
) -> NDArray[np.int64]:
    """Bytes each token stands for.

    Exact for byte-level BPE: there each character of a token's name is one byte. Else the length
    of the name as UTF-8, once the marks for spaces ("▁") and word pieces ("##") are undone and
    "<0x41>" counts one: exact for what such a tokenizer can reproduce, near for what it normalises
    away (case, accents, runs of spaces).
    """
    byte_level = '"ByteLevel"' in json.dumps([spec["decoder"], spec["pre_tokenizer"]])
    out = np.zeros(vocab, np.int64)
    for name, index in known.items():
        if name in added:
            out[index] = 0 if added[name]["special"] else len(name.encode("utf-8"))
        elif byte_level:
            out[index] = len(name)
        elif len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
            out[index] = 1
        else:
            out[index] = len(name.removeprefix("##").replace("▁", " ").encode("utf-8"))
    return out
