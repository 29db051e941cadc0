"""The JSON of OpenAI's legacy completions: what is read, and what is written."""

import json
import secrets
import time
from collections import defaultdict
from collections.abc import Sequence
from itertools import accumulate
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moe_router.errors import ConfigError
from moe_router.models.sampling import MOST
from moe_router.serving.requests import STOP_CHARACTERS, STOPS, Ask, Piece, Said

_Id = Annotated[int, Field(ge=0)]
_Ids = Annotated[list[_Id], Field(min_length=1)]
_Stop = Annotated[str, Field(min_length=1, max_length=STOP_CHARACTERS)]
_WANTED = {
    "prompt": "a text, a list of texts, a list of token ids, or a list of such lists",
    "messages": "a list of {role, content}, content a text or a list of text parts",
    "stop": f"a text or up to {STOPS} texts, each of 1..{STOP_CHARACTERS} characters",
}


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: bool = False


class Common(Strict):
    """What both kinds of request have."""

    model: str | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=MOST)] | None = None  # not OpenAI's; 0 is off
    seed: int | None = None
    # not OpenAI's either: see `Ask.compute_budget`
    compute_budget: Annotated[float, Field(ge=0, le=1)] | None = None
    stop: _Stop | Annotated[list[_Stop], Field(max_length=STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    n: Literal[1] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None

    @classmethod
    def read(cls, body: bytes) -> Self:
        """Parse a body. Raises FieldError: it is no such request."""
        try:
            return cls.model_validate_json(body)
        except ValidationError as error:
            raise FieldError.of(error) from None

    @property
    def sampling(self) -> dict[str, Any]:
        """Of an `Ask`."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        how = {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        return {**how, "seed": self.seed, "stop": stop, "compute_budget": self.compute_budget}

    @property
    def with_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(Common):
    """Fields that this server has no use for are taken at the value that changes nothing."""

    prompt: str | _Ids | list[str] | list[_Ids]
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    best_of: Literal[1] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    suffix: Literal[""] | None = None

    @property
    def ask(self) -> Ask:
        return Ask(
            prompts=_prompts(self.prompt),
            max_tokens=self.max_tokens,
            logprobs=self.logprobs,
            echo=bool(self.echo),
            **self.sampling,
        )


class CompletionFormat:
    """How an answer is written.

    Args:
        logprobs: were asked for.
    """

    def __init__(self, model: str, *, logprobs: bool) -> None:
        self._model, self._logprobs = model, logprobs
        self._id, self._created = id_of("cmpl"), int(time.time())
        self._start: dict[int, int] = defaultdict(int)  # characters that were scored

    def whole(self, choices: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        return self.chunk(choices, usage=usage)

    def chunk(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        about = {"id": self._id, "object": "text_completion", "created": self._created}
        return {**about, "model": self._model, "choices": choices, **more}

    def choice(self, index: int, text: str, finish: str, said: Sequence[Said]) -> dict[str, Any]:
        """Of a whole answer, or of a part of it, in order."""
        told = None
        if self._logprobs:
            told = logprobs_of(said, self._start[index])
            self._start[index] += sum(len(one.text) for one in said)
        return {"text": text, "index": index, "logprobs": told, "finish_reason": finish or None}

    part = choice


def _prompts(
    asked: str | list[int] | list[str] | list[list[int]],
) -> tuple[str | tuple[int, ...], ...]:
    if isinstance(asked, str):
        return (asked,)
    ids = tuple(i for i in asked if isinstance(i, int))
    if ids:
        return (ids,)
    return tuple(p if isinstance(p, str) else tuple(p) for p in asked if not isinstance(p, int))


class FieldError(ConfigError):
    """Attributes:
    field: the field of the request that is wrong, None if it is no JSON object.
    """

    def __init__(self, field: str | None, message: str) -> None:
        self.field = field
        super().__init__(message)

    @classmethod
    def of(cls, error: ValidationError) -> "FieldError":
        first = error.errors(include_url=False)[0]
        if not first["loc"]:
            return cls(None, f"the body is no JSON object: {first['msg']}")
        field = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            return cls(field, f"Unrecognized request argument supplied: {field}")
        top = str(first["loc"][0])
        if top in _WANTED:
            return cls(top, f"{top}: want {_WANTED[top]}")
        got = json.dumps(first["input"], default=str)[:80]
        return cls(top, f"{field}={got}: {first['msg']}")


def id_of(kind: str) -> str:
    return f"{kind}-{secrets.token_hex(12)}"


def logprobs_of(said: Sequence[Said], start: int = 0) -> dict[str, Any]:
    """Args:
    start: characters of the answer before these tokens.
    """
    offsets = [0, *accumulate(len(one.text) for one in said)]
    return {
        "tokens": [one.text for one in said],
        "token_logprobs": [one.logprob for one in said],
        # the likeliest tokens of the first place are unknown; equal texts keep the likelier
        "top_logprobs": [None if one.logprob is None else dict(reversed(one.top)) for one in said],
        "text_offset": [start + offset for offset in offsets[:-1]],
    }


def usage(last: Sequence[Piece]) -> dict[str, Any]:
    """Args:
    last: the last piece of each prompt.
    """
    prompt, made = sum(p.prompt_tokens for p in last), sum(p.made for p in last)
    counts = {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}
    return counts | {"prompt_tokens_details": {"cached_tokens": sum(p.known for p in last)}}


def error_body(
    message: str, kind: str, *, code: str | None = None, param: str | None = None
) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
