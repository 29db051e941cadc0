"""A prompt that somebody waits for: the ranks' events become pieces of its answer."""

import asyncio
from dataclasses import dataclass, field
from time import perf_counter
from typing import Self

from moe_router.errors import MoeRouterError
from moe_router.serving.requests import Ask, Event, Finish, Piece, Request, Said, Score, Trace
from moe_router.serving.text import TextStream
from moe_router.training.data import Tokenizer

TOGETHER_S = 0.05  # a piece costs as much as some tokens, and people see no more than 20 a second


@dataclass(slots=True)
class Waiting:
    """Attributes:
    inbox: of the call, for all its prompts.
    index: of the prompt in the call.
    echo: what the answer begins with.
    unsaid: of the first scores, those of a separator that the client has not sent.
    asked, last: when the client did, and when its last token came, in seconds of some clock.
    made: tokens of the answer so far.
    known: tokens of the prompt that a rank remembered.
    texts, tokens, said, finish, trace: of the next piece.
    """

    inbox: "Inbox"
    index: int
    prompt_tokens: int
    tokenizer: Tokenizer
    text: TextStream
    echo: str
    unsaid: int
    asked: float
    made: int = 0
    known: int = 0
    last: float | None = None
    texts: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    said: list[Said] = field(default_factory=list)
    finish: Finish = ""
    trace: Trace | None = None

    @classmethod
    def of(
        cls, inbox: "Inbox", index: int, request: Request, ask: Ask, tokenizer: Tokenizer
    ) -> Self:
        asked, prompt = ask.prompts[index], request.prompt
        echo = asked if isinstance(asked, str) else tokenizer.decode(list(asked))
        scored = ask.echo and ask.logprobs is not None
        return cls(
            inbox,
            index,
            len(prompt),
            tokenizer,
            TextStream(tokenizer, prompt, ask.stop),
            echo if ask.echo else "",
            int(scored and isinstance(asked, str)),
            perf_counter(),
        )

    def take(self, event: Event) -> Finish:
        """Pass a token on; says whether and why the answer has ended."""
        text, finish = self.echo, event.finish
        self.known = max(self.known, event.known)  # again, if its rank was made anew
        if event.token is not None:
            self.made += 1
            self.tokens.append(event.token)
            new, stopped = self.text.push(event.token)
            text += new
            finish = "stop" if stopped else finish
            if finish and not stopped:
                text += self.text.end()
        elif finish:
            text += self.text.end()
        self.texts.append(text)
        self.said += [self._said(score) for score in event.scores[self.unsaid :]]
        self.finish, self.trace = finish, event.trace
        self.echo, self.unsaid = "", 0
        self.inbox.told(self)
        return finish

    def piece(self) -> Piece:
        """What has come since the one before."""
        text, tokens, said = "".join(self.texts), tuple(self.tokens), tuple(self.said)
        self.texts, self.tokens, self.said = [], [], []
        return Piece(
            self.index, text, tokens, self.finish, self.prompt_tokens, self.made, self.trace, said,
            self.known,
        )  # fmt: skip

    def _said(self, score: Score) -> Said:
        text = self.tokenizer.decode
        top = tuple((text([token]), logprob) for token, logprob in score.top)
        return Said(text([score.token]), score.logprob, top)


class Inbox:
    """Of one call: what is new goes out at once, but not sooner than `every_s` after what went
    before it, and together with what comes meanwhile. An end does not wait.

    Args:
        every_s: 0: each token is a piece of its own.
    """

    def __init__(self, every_s: float) -> None:
        self._every_s, self._due = every_s, 0.0
        self._growing: dict[int, Waiting] = {}
        self._pieces: list[Piece] = []
        self._error: MoeRouterError | None = None
        self._news = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None

    def told(self, waiting: Waiting) -> None:
        if not self._every_s:
            self._pieces.append(waiting.piece())
            self._news.set()
            return
        self._growing[waiting.index] = waiting
        loop = asyncio.get_running_loop()
        if waiting.finish or loop.time() >= self._due:
            self._news.set()
        elif self._timer is None:
            self._timer = loop.call_at(self._due, self._news.set)

    def fail(self, error: MoeRouterError) -> None:
        """After what was told."""
        self._error = error
        self._news.set()

    async def take(self) -> list[Piece]:
        """What is new, at least one piece. Raises what it failed with."""
        await self._news.wait()
        self._news.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        pieces = [*self._pieces, *(waiting.piece() for waiting in self._growing.values())]
        self._pieces.clear()
        self._growing.clear()
        if self._error is not None:
            if not pieces:
                raise self._error
            self._news.set()
        self._due = asyncio.get_running_loop().time() + self._every_s
        return pieces
