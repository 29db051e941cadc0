"""Tokens to text, a token at a time: whole characters only, and nothing of a stop string."""

from collections.abc import Sequence

from moe_router.training.data import Tokenizer

_TORN = "\ufffd"  # what a decoder makes of bytes that are no character, or not one yet
_PENDING = 3  # a character has at most 4 bytes, so at most so many wait for the last one
_CONTEXT = 8  # tokens: some decoders treat the first token of a text as no other
_WINDOW = 16  # tokens that are decoded anew for each one


class TextStream:
    """The text of one answer, as it grows.

    Args:
        prompt: token ids before the answer: what a token stands for may depend on them.
        stop: texts that end the answer.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._ids = _tail(tokenizer, prompt)
        self._shown = _whole(tokenizer.decode(self._ids))  # of the text of _ids
        self._stuck = 0  # tokens since the text last grew at its end alone
        self._stop = stop
        self._held = ""  # decoded, but perhaps the beginning of a stop string

    def push(self, token: int) -> tuple[str, bool]:
        """The text that is certain now, and whether a stop string has ended the answer."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        new = self._grow(_whole(text))
        if len(self._ids) > _WINDOW and self._shown == text:
            self._forget(text)
        return self._without_stop(new)

    def end(self) -> str:
        """What was held back; the answer has no more tokens."""
        rest = self._tokenizer.decode(self._ids)[len(self._shown) :]
        text, stopped = self._without_stop(rest)
        return text if stopped else text + self._held

    def _grow(self, text: str) -> str:
        """What text has more than what was shown."""
        if not text.startswith(self._shown) and self._stuck < _PENDING:
            # some decoders take back a character until the bytes after it are one too
            self._stuck += 1
            return ""
        new = text[len(self._shown) :]
        self._shown, self._stuck = text, 0
        return new

    def _forget(self, text: str) -> None:
        """Decode no more than a few tokens of the past, if they stand for themselves."""
        ids = self._ids[-_CONTEXT:]
        tail = self._tokenizer.decode(ids)
        if text.endswith(tail):
            self._ids, self._shown = ids, tail

    def _without_stop(self, new: str) -> tuple[str, bool]:
        text = self._held + new
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held], False


def _tail(tokenizer: Tokenizer, prompt: Sequence[int]) -> list[int]:
    """The last tokens of a prompt, not beginning inside a character."""
    tails = [list(prompt[-n:]) for n in range(_CONTEXT, _CONTEXT + _PENDING + 1)]
    whole = (tail for tail in tails if not tokenizer.decode(tail).startswith(_TORN))
    return next(whole, tails[0])


def _whole(text: str) -> str:
    """Without the end that later bytes may still turn into a character."""
    for _ in range(_PENDING):
        text = text.removesuffix(_TORN)
    return text


def _overlap(text: str, stop: str) -> int:
    """The longest end of text with which stop begins."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
