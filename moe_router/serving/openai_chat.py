"""The JSON of OpenAI's chat completions: what is read, and what is written."""

import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from moe_router.serving.openai_types import Common, Strict, id_of
from moe_router.serving.requests import Ask, Said


class _Text(Strict):
    type: Literal["text"]
    text: str


class _Message(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[_Text], Field(min_length=1)]
    name: str | None = None

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class _Format(Strict):
    type: Literal["text"]


class ChatRequest(Common):
    """Fields that this server has no use for are taken at the value that changes nothing."""

    messages: Annotated[list[_Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    response_format: _Format | None = None

    @property
    def ask(self) -> Ask:
        most = self.max_completion_tokens
        return Ask(
            prompts=(),
            messages=tuple((message.role, message.text) for message in self.messages),
            max_tokens=self.max_tokens if most is None else most,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            **self.sampling,
        )


class ChatFormat:
    """How an answer is written.

    Args:
        logprobs: were asked for.
    """

    def __init__(self, model: str, *, logprobs: bool) -> None:
        self._model, self._logprobs = model, logprobs
        self._id, self._created = id_of("chatcmpl"), int(time.time())
        self._begun: set[int] = set()

    def whole(self, choices: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        return self._body("chat.completion", choices, usage=usage)

    def chunk(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        return self._body("chat.completion.chunk", choices, **more)

    def choice(self, index: int, text: str, finish: str, said: Sequence[Said]) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, **self._rest(finish, said)}

    def part(self, index: int, text: str, finish: str, said: Sequence[Said]) -> dict[str, Any]:
        delta: dict[str, Any] = {"content": text}
        if index not in self._begun:
            delta |= {"role": "assistant"}
            self._begun.add(index)
        return {"index": index, "delta": delta, **self._rest(finish, said)}

    def _rest(self, finish: str, said: Sequence[Said]) -> dict[str, Any]:
        told = {"content": [_told(one) for one in said], "refusal": None}
        return {"logprobs": told if self._logprobs else None, "finish_reason": finish or None}

    def _body(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        about = {"id": self._id, "object": kind, "created": self._created, "model": self._model}
        return {**about, "choices": choices, **more}


def _told(said: Said) -> dict[str, Any]:
    top = [_token(text, logprob) for text, logprob in said.top]
    return {**_token(said.text, said.logprob), "top_logprobs": top}


def _token(text: str, logprob: float | None) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}
