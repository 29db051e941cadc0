"""A long line of tokens, and the rows of fixed length that training reads from it."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_router.errors import DataError

TokenArray = NDArray[Any]  # one-dimensional, unsigned integers of any width, maybe memory-mapped


class Segments:
    """Arrays of tokens read as one line, end to end, without being copied together."""

    def __init__(self, parts: Sequence[TokenArray]) -> None:
        """
        Args:
            parts: (n,) unsigned integers each; mapped arrays stay mapped.
        """
        self._parts = [part for part in parts if len(part)]
        self._ends = list(accumulate(map(len, self._parts)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def cut(self, start: int, stop: int) -> "Segments":
        """Tokens start : stop, as views."""
        return Segments(list(self.pieces(start, stop)))

    def pieces(self, start: int, stop: int) -> Iterator[TokenArray]:
        """Views that make up tokens start : stop, in order."""
        i = bisect_right(self._ends, start)
        while start < stop and i < len(self._parts):
            first = self._ends[i] - len(self._parts[i])
            yield self._parts[i][start - first : stop - first]
            start, i = self._ends[i], i + 1

    def read(self, start: int, out: NDArray[np.int32]) -> None:
        """Copy tokens start : start + len(out) into `out`."""
        at = 0
        for piece in self.pieces(start, start + len(out)):
            out[at : at + len(piece)] = piece
            at += len(piece)


class TokenStream:
    """Rows of `seq_len` tokens and the token after each, by index; holds no position.

    Row i is tokens i * seq_len : (i + 1) * seq_len + 1, so that every token but the first of the
    stream is predicted once. The last tokens, too few for a row, are left out.
    """

    def __init__(self, tokens: Segments, *, seq_len: int, vocab: int, where: str) -> None:
        """
        Args:
            tokens: the stream, documents after their separators.
            seq_len: tokens in a row.
            vocab: every id is below it.
            where: named in errors.

        Raises:
            DataError: there is not one whole row.
        """
        self.seq_len = seq_len
        self.rows = max(0, len(tokens) - 1) // seq_len
        self.tokens = tokens
        self._vocab = vocab
        self._where = where
        if self.rows < 1:
            raise DataError(
                f"{where} has {len(tokens)} tokens, want at least {seq_len + 1} for one row; "
                "give more text, or change data.seq_len or data.val_fraction"
            )

    def row(self, i: int) -> NDArray[np.int32]:
        """(seq_len + 1,) int32: the inputs of row i, and one token more for the last target."""
        row: NDArray[np.int32] = self.rows_at([i])[0]
        return row

    def rows_at(self, index_B: Sequence[int]) -> NDArray[np.int32]:
        """(B, seq_len + 1) int32: several rows.

        Raises:
            IndexError: a row outside 0..rows-1.
            DataError: a token that the vocabulary does not have.
        """
        out = np.empty((len(index_B), self.seq_len + 1), np.int32)
        for b, i in enumerate(index_B):
            if not 0 <= i < self.rows:
                raise IndexError(f"row {i} of {self._where}: want 0..{self.rows - 1}")
            self.tokens.read(i * self.seq_len, out[b])
        # uint32 ids past 2**31 arrive negative: seen as unsigned, they are too large as well.
        if out.size:
            self._refuse_foreign(int(out.view(np.uint32).max()))
        return out

    def counts(self, limit: int) -> NDArray[np.int64]:
        """(vocab,) int64: how often each id occurs among the first `limit` tokens.

        Raises:
            DataError: a token that the vocabulary does not have.
        """
        total_V = np.zeros(self._vocab, np.int64)
        window = 1 << 20  # bincount widens its input to int64: a window at a time
        stop = min(limit, len(self.tokens))
        for start in range(0, stop, window):
            for piece in self.tokens.pieces(start, min(start + window, stop)):
                self._refuse_foreign(int(piece.max()))
                total_V += np.bincount(piece, minlength=self._vocab)
        return total_V

    def _refuse_foreign(self, token: int) -> None:
        if token >= self._vocab:
            raise DataError(
                f"{self._where}: token {token}, want below {self._vocab}, the vocabulary of "
                "data.tokenizer; name the tokenizer that made these shards"
            )
