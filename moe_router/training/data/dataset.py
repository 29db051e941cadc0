"""From `DataConfig` to two token streams: tokenise, pack, split, measure."""

from array import array
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from moe_router.config import DataConfig
from moe_router.errors import DataError
from moe_router.training.data.files import Text
from moe_router.training.data.shards import open_shards
from moe_router.training.data.sources import Corpus, read_corpus
from moe_router.training.data.stream import Segments, TokenArray, TokenStream
from moe_router.training.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer

_LONG = 1 << 20  # tokens from which a document stays the array it is, instead of being packed
_PIECE = 1 << 18  # bytes of text given to a tokenizer file at once: it needs ~100 bytes for each
_ENTROPY_OVER = 1 << 26  # held-out tokens that the unigram entropy is taken over, at most


@dataclass(frozen=True, slots=True)
class Dataset:
    """What a run trains on and is measured on.

    Attributes:
        train, val: rows by index; `val` is held out.
        tokenizer: made the ids.
        unigram_bits_per_byte: entropy of the held-out tokens, separators aside, in bits per byte
            of their text: what a model reaches that knows how often each token occurs and no more.
    """

    train: TokenStream
    val: TokenStream
    tokenizer: Tokenizer
    unigram_bits_per_byte: float

    @property
    def vocab(self) -> int:
        """Token ids."""
        return self.tokenizer.vocab


def load_text(config: DataConfig) -> Dataset:
    """Read, tokenise and split what `config` names. The same config gives the same dataset.

    Raises:
        DataError: data is missing, empty, damaged, cannot be downloaded, or is too short for one
            row of data.seq_len in either part.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    where = f"data.path={config.path}" if config.path else f"data.source={config.source}"
    if config.source == "shards":
        train, val = open_shards(config.path or "", tokenizer, config.val_fraction)
    else:
        train, val = _split(read_corpus(config), tokenizer, config.val_fraction)
    streams = [
        TokenStream(part, seq_len=config.seq_len, vocab=tokenizer.vocab, where=f"{where}: {name}")
        for part, name in ((train, "the training part"), (val, "the held-out part"))
    ]
    entropy = _unigram_bits_per_byte(streams[1], tokenizer, where)
    return Dataset(streams[0], streams[1], tokenizer, entropy)


class _Packer:
    """Documents in a line, each after its separator: short ones share a buffer that grows in
    place, long ones stay the (maybe mapped) arrays they are."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._separator = tokenizer.document_id
        self._code = "H" if tokenizer.vocab <= 1 << 16 else "I"
        self._buffer = array(self._code)
        self._parts: list[TokenArray] = []
        self._packed = 0  # tokens in _parts
        self.starts = array("q")  # where each separator stands

    def add(self, tokens: TokenArray) -> None:
        """Append a document."""
        self.starts.append(self._packed + len(self._buffer))
        self._buffer.append(self._separator)
        if len(tokens) < _LONG:
            self._buffer.frombytes(np.asarray(tokens, np.dtype(self._code)).tobytes())
            return
        self._flush()
        self._parts.append(tokens)
        self._packed += len(tokens)

    def _flush(self) -> None:
        if self._buffer:
            self._parts.append(np.frombuffer(self._buffer, np.dtype(self._code)))
            self._packed += len(self._buffer)
            self._buffer = array(self._code)

    def line(self) -> Segments:
        """All documents added so far."""
        self._flush()
        return Segments(self._parts)


def _split(corpus: Corpus, tokenizer: Tokenizer, val_fraction: float) -> tuple[Segments, Segments]:
    """Training and held-out tokens: whole documents, or one document cut."""
    packer = _Packer(tokenizer)
    for document in corpus.documents:
        packer.add(_encode(document, tokenizer))
    line, count = packer.line(), len(packer.starts)
    if count == 1:
        cut = round(len(line) * (1 - val_fraction))
    else:
        held_out = corpus.held_out or min(count - 1, max(1, round(count * val_fraction)))
        cut = packer.starts[count - held_out]
    return line.cut(0, cut), line.cut(cut, len(line))


def _encode(document: Text, tokenizer: Tokenizer) -> TokenArray:
    if isinstance(tokenizer, ByteTokenizer):
        return document  # bytes are their own ids
    ids = array("I")
    for piece in _pieces(document):
        # The public corpora are cut at a byte count, so half a character can stand at an end.
        ids.extend(tokenizer.encode(piece.decode("utf-8", errors="replace")))
    return np.frombuffer(ids, np.uint32) if ids else np.zeros(0, np.uint32)


def _pieces(document: Text) -> Iterator[bytes]:
    """A long document in pieces that end after a line, or else between two characters."""
    start = 0
    while start < len(document):
        window = document[start : start + _PIECE].tobytes()
        end = len(window)
        if start + end < len(document):
            end = window.rfind(b"\n") + 1 or _before_a_character(window)
        yield window[:end]
        start += end


def _before_a_character(window: bytes) -> int:
    """The last place in a window where a UTF-8 character starts; its end if there is none."""
    return next((i for i in range(len(window) - 1, 0, -1) if window[i] & 0xC0 != 0x80), len(window))


def _unigram_bits_per_byte(val: TokenStream, tokenizer: Tokenizer, where: str) -> float:
    count_V = val.counts(_ENTROPY_OVER)
    count_V[tokenizer.document_id] = 0
    size = int(count_V @ tokenizer.bytes_of)
    if size == 0:
        raise DataError(f"{where}: the held-out part has no text; give more, or shuffle the files")
    seen = count_V[count_V > 0].astype(np.float64)
    return float((seen * np.log2(seen.sum() / seen)).sum() / size)
