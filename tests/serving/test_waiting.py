"""Pieces of an answer: the first at once, later ones together, an end without waiting."""

import asyncio
import json
import time

import pytest

from moe_router.errors import ClusterError
from moe_router.models import Sampling
from moe_router.serving.engine import Engine
from moe_router.serving.group import OneRank
from moe_router.serving.requests import Ask, Event, Request
from moe_router.serving.waiting import Inbox, Waiting
from tests.serving.web import MODEL, STOP, call, served
from tests.serving.work import TOKENIZER


def prompts(inbox, *texts):
    ask = Ask(prompts=texts)
    ids = [tuple(text.encode()) for text in texts]
    requests = [Request(i, one, Sampling()) for i, one in enumerate(ids)]
    return [Waiting.of(inbox, i, one, ask, TOKENIZER) for i, one in enumerate(requests)]


def tell(waiting, text, finish=""):
    for i, token in enumerate(text.encode()):
        waiting.take(Event(0, token, finish if i == len(text) - 1 else ""))


def run(client):
    return asyncio.run(asyncio.wait_for(client(), 20))


def test_the_first_token_goes_out_at_once_and_later_ones_together():
    async def client():
        inbox = Inbox(0.2)
        (one,) = prompts(inbox, "x")
        tell(one, "a")
        (first,) = await inbox.take()
        began = time.monotonic()
        tell(one, "bc")
        asyncio.get_running_loop().call_later(0.05, tell, one, "d")
        (then,) = await inbox.take()
        return first, then, time.monotonic() - began

    first, then, waited = run(client)
    assert (first.text, first.tokens, first.made) == ("a", (97,), 1)
    assert (then.text, then.tokens, then.made) == ("bcd", (98, 99, 100), 4)
    assert waited > 0.15


def test_an_end_does_not_wait_and_brings_what_the_other_prompts_have():
    async def client():
        inbox = Inbox(1000.0)
        one, other = prompts(inbox, "x", "y")
        tell(one, "a")
        await inbox.take()
        tell(one, "b")
        tell(other, "cd", finish="length")
        return await inbox.take()

    told = run(client)
    assert [(p.index, p.text, p.finish) for p in told] == [(0, "b", ""), (1, "cd", "length")]


def test_an_error_follows_what_was_told():
    async def client():
        inbox = Inbox(1000.0)
        (one,) = prompts(inbox, "x")
        tell(one, "a")
        await inbox.take()
        tell(one, "b")
        inbox.fail(ClusterError("gone"))
        (last,) = await inbox.take()
        with pytest.raises(ClusterError, match="gone"):
            await inbox.take()
        return last

    assert run(client).text == "b"


@pytest.mark.parametrize("trace", [False, True])
def test_an_engine_makes_few_pieces_of_many_tokens_unless_they_are_traced(trace):
    async def client():
        async with Engine(OneRank(MODEL, STOP), TOKENIZER, "tiny", together_s=1000.0) as engine:
            ask = Ask(prompts=("The ",), max_tokens=40, seed=1, temperature=1.0, trace=trace)
            return [piece async for piece in engine.stream(ask)]

    told = run(client)
    assert sum(len(piece.tokens) for piece in told) == told[-1].made == 40
    assert len(told) == (40 if trace else 2)


def test_over_http_the_text_is_whole_in_fewer_events():
    body = {"prompt": "The ", "max_tokens": 40, "temperature": 0.7, "seed": 1, "logprobs": 1}
    found = []
    for together_s in (0.0, 1000.0):
        with served(together_s=together_s) as (port, _):
            text = call(port, "POST", "/v1/completions", body | {"stream": True})[1]
        *events, done, _ = [part.removeprefix("data: ") for part in text.split("\n\n")]
        assert done == "[DONE]"
        choices = [json.loads(event)["choices"][0] for event in events]
        scores = [one for choice in choices for one in choice["logprobs"]["token_logprobs"]]
        found.append(("".join(choice["text"] for choice in choices), scores, len(events)))
    (alone, scores, many), (together, same, few) = found
    assert alone == together and scores == pytest.approx(same, abs=1e-5)
    assert few <= 2 < many
