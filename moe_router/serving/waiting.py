"""A prompt that somebody waits for: the ranks' events become pieces of its answer."""

import asyncio
from dataclasses import dataclass
from time import perf_counter
from typing import Self

from moe_router.errors import MoeRouterError
from moe_router.serving.requests import Ask, Event, Finish, Piece, Request, Said, Score
from moe_router.serving.text import TextStream
from moe_router.training.data import Tokenizer

Inbox = asyncio.Queue[Piece | MoeRouterError]


@dataclass(slots=True)
class Waiting:
    """Attributes:
    inbox: of the call, for all its prompts.
    index: of the prompt in the call.
    echo: what the answer begins with.
    unsaid: of the first scores, those of a separator that the client has not sent.
    asked, last: when the client did, and when its last token came, in seconds of some clock.
    """

    inbox: Inbox
    index: int
    prompt_tokens: int
    tokenizer: Tokenizer
    text: TextStream
    echo: str
    unsaid: int
    asked: float
    made: int = 0
    last: float | None = None

    @classmethod
    def of(cls, inbox: Inbox, index: int, request: Request, ask: Ask, tokenizer: Tokenizer) -> Self:
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
        if event.token is not None:
            self.made += 1
            new, stopped = self.text.push(event.token)
            text += new
            finish = "stop" if stopped else finish
            if finish and not stopped:
                text += self.text.end()
        elif finish:
            text += self.text.end()
        tokens = () if event.token is None else (event.token,)
        said = tuple(self._said(score) for score in event.scores[self.unsaid :])
        counts = (self.prompt_tokens, self.made)
        self.inbox.put_nowait(Piece(self.index, text, tokens, finish, *counts, event.trace, said))
        self.echo, self.unsaid = "", 0
        return finish

    def _said(self, score: Score) -> Said:
        text = self.tokenizer.decode
        top = tuple((text([token]), logprob) for token, logprob in score.top)
        return Said(text([score.token]), score.logprob, top)
