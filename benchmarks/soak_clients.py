"""Clients of `benchmarks.soak`, patient, slow, vanishing and broken: what became of each."""

import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import aiohttp

Way = Literal["stream", "whole", "slow", "vanish", "malformed"]
Kind = Literal["answered", "refused", "vanished", "wrong", "lost"]
WAYS: dict[Way, float] = {
    "stream": 0.55, "whole": 0.25, "slow": 0.05, "vanish": 0.10, "malformed": 0.05,
}  # fmt: skip
MALFORMED = [
    b"", b"null", b"[" * 10_000, b'{"prompt": 3}', b'{"prompt": "a", "top_k": 1e99}',
    b'{"prompt": "a", "max_tokens": 100000000}', b'{"prompt": [99999]}', b"\xff\xfe", b'{"prompt":',
]  # fmt: skip
PATIENCE_S = 120.0


@dataclass(frozen=True, slots=True)
class Question:
    """Attributes:
    want: the text that `generate` gives.
    """

    prompt: str
    max_tokens: int
    seed: int
    want: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """Attributes:
    status: of HTTP; 0: none came.
    reason: why it was refused, or how it was lost.
    first_s, total_s: until the first event, and the last.
    at: when it was asked, seconds of the soak.
    """

    way: Way
    kind: Kind
    status: int
    reason: str = ""
    first_s: float = 0.0
    total_s: float = 0.0
    at: float = 0.0


async def ask(
    session: aiohttp.ClientSession, address: str, question: Question, way: Way, at: float
) -> Outcome:
    """One request, to its end."""
    streamed = way in ("stream", "slow") or (way == "vanish" and question.seed % 2 == 0)
    body = json.dumps(
        {
            "prompt": question.prompt, "max_tokens": question.max_tokens, "seed": question.seed,
            "temperature": 0.8, "stream": streamed,
        }
    ).encode()  # fmt: skip
    if way == "malformed":
        body = MALFORMED[question.seed % len(MALFORMED)]
    began = time.perf_counter()
    patience = 0.15 if way == "vanish" and not streamed else PATIENCE_S
    try:
        async with (
            asyncio.timeout(patience),
            session.post(
                f"{address}/v1/completions", data=body, headers={"Content-Type": "application/json"}
            ) as answer,
        ):
            if answer.status != 200:
                return _refused(way, answer.status, await answer.text(), at)
            if way == "malformed":
                return Outcome(way, "wrong", 200, f"answered {body[:40]!r}", at=at)
            if not streamed:
                text = json.loads(await answer.text())["choices"][0]["text"]
                return _ended(way, text, question, began, time.perf_counter(), at)
            return await _read(answer, way, question, began, at)
    except (aiohttp.ClientError, OSError) as error:
        if way == "vanish" and isinstance(error, TimeoutError):
            return Outcome(way, "vanished", 0, at=at)
        reason = f"{type(error).__name__} {error}".strip()
        return Outcome(way, "lost", 0, reason, total_s=time.perf_counter() - began, at=at)


async def _read(
    answer: aiohttp.ClientResponse, way: Way, question: Question, began: float, at: float
) -> Outcome:
    """A stream of events."""
    text, first = "", 0.0
    async for line in answer.content:
        if line == b"data: [DONE]\n":
            return _ended(way, text, question, began, first, at)
        if not line.startswith(b"data: "):
            continue
        event = json.loads(line[6:])
        if "error" in event:
            return _refused(way, 200, line[6:].decode(), at)
        first = first or time.perf_counter()
        text += event["choices"][0]["text"]
        if way == "vanish":
            return Outcome(way, "vanished", 200, at=at)  # leaving the block closes the connection
        if way == "slow":
            await asyncio.sleep(0.3)
    return Outcome(way, "lost", 200, "the stream ended without [DONE]", at=at)


def _ended(
    way: Way, text: str, question: Question, began: float, first: float, at: float
) -> Outcome:
    kind: Kind = "answered" if text == question.want else "wrong"
    reason = "" if kind == "answered" else f"{text!r} is not {question.want!r}"
    took = time.perf_counter() - began
    return Outcome(way, kind, 200, reason, (first or time.perf_counter()) - began, took, at)


def _refused(way: Way, status: int, text: str, at: float) -> Outcome:
    """With a reason in OpenAI's format, or else it is lost."""
    try:
        return Outcome(way, "refused", status, json.loads(text)["error"]["message"], at=at)
    except (ValueError, KeyError, TypeError):
        return Outcome(way, "lost", status, f"refused without a reason: {text[:120]!r}", at=at)


async def capacity(address: str, questions: Sequence[Question], seconds: float) -> float:
    """Answers/s of patient clients, of whom there are always enough."""
    answered, end = 0, time.perf_counter() + seconds
    async with _session() as session:

        async def client(draw: random.Random) -> None:
            nonlocal answered
            while time.perf_counter() < end:
                outcome = await ask(session, address, draw.choice(questions), "stream", 0.0)
                answered += outcome.kind == "answered" and time.perf_counter() < end

        await asyncio.gather(*(client(random.Random(i)) for i in range(96)))
    return answered / seconds


async def load(
    address: str, questions: Sequence[Question], rate: float, seconds: float
) -> list[Outcome]:
    """Clients arrive at random, `rate` a second, whatever becomes of those before them."""
    draw, began = random.Random(0), time.perf_counter()
    calls: list[asyncio.Task[Outcome]] = []
    due = 0.0
    async with _session() as session:
        while (due := due + draw.expovariate(rate)) < seconds:
            await asyncio.sleep(max(0.0, began + due - time.perf_counter()))
            (way,) = draw.choices(list(WAYS), list(WAYS.values()))
            call = ask(session, address, draw.choice(questions), way, due)
            calls.append(asyncio.create_task(call))
        return await asyncio.gather(*calls)


def _session() -> aiohttp.ClientSession:
    # a connection for each: a proxy that restarts must not be blamed for one that was kept
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, force_close=True))
