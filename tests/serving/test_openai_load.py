"""The HTTP front when clients hang up, come in numbers, or lose the ranks behind it."""

import asyncio
import http.client
import json
import re
import threading
import time

import pytest

from moe_router.errors import ClusterError
from moe_router.serving.engine import Engine
from moe_router.serving.group import OneRank
from moe_router.serving.openai import make_app
from tests.serving.web import MODEL, STOP, call, complete, served
from tests.serving.work import TOKENIZER


@pytest.mark.parametrize("streamed", [True, False])
def test_who_hangs_up_is_forgotten(streamed):
    with served(slots=1) as (port, group):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        body = json.dumps({"prompt": "a", "max_tokens": 20_000, "seed": 1, "stream": streamed})
        kind = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/completions", body, kind)
        if streamed:
            answer = connection.getresponse()
            assert answer.readline().startswith(b"data: ")
            answer.close()
        else:
            while group.passes < 3:
                pass
        connection.close()
        assert complete(port, max_tokens=2, seed=1)[0] == 200
        assert group.passes < 2_000


@pytest.mark.parametrize("path", ["/v1/completions", "/demo/stream"])
def test_who_hangs_up_before_the_first_token_waits_no_longer(path):
    with served(slots=1, page=True) as (port, _):
        first, second = (http.client.HTTPConnection("127.0.0.1", port) for _ in range(2))
        for connection, where in ((first, "/v1/completions"), (second, path)):
            body = json.dumps({"prompt": "a", "max_tokens": 20_000, "seed": 1, "stream": True})
            connection.request("POST", where, body, {"Content-Type": "application/json"})
            while not waits(port, "running" if connection is first else "waiting"):
                pass
        second.close()
        end = time.monotonic() + 5
        while waits(port, "waiting"):
            assert time.monotonic() < end
        assert waits(port, "running")
        first.close()


def waits(port, what):
    """How many requests do, or run."""
    text = call(port, "GET", "/metrics")[1]
    return float(re.search(rf"^moe_router_serving_{what} (.+)$", text, re.MULTILINE)[1])


def test_a_full_queue_is_429_and_says_when_to_come_back():
    with served(slots=1, queue=1) as (port, _):
        answers = []
        body = {"prompt": "a", "max_tokens": 300, "seed": 1}

        def ask():
            answers.append(call(port, "POST", "/v1/completions", body))

        threads = [threading.Thread(target=ask) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert {status for status, *_ in answers} == {200, 429}
        for status, text, headers in answers:
            if status == 429:
                assert headers["Retry-After"] == "1"
                assert json.loads(text)["error"]["code"] == "rate_limit_exceeded"


def test_a_lost_group_is_503_and_health_is_red():
    with served() as (port, group):
        group.lost = True
        status, text, headers = call(port, "POST", "/v1/completions", {"prompt": "a"})
        assert status == 503 and int(headers["Retry-After"]) > 0
        assert "the only rank was lost" in json.loads(text)["error"]["message"]
        status, text, _ = call(port, "GET", "/health")
        assert status == 503 and "rank 0 died" in json.loads(text)["reason"]


def test_a_loss_in_the_middle_of_a_stream_is_an_event():
    class Breaks:
        model = "tiny"

        async def stream(self, ask):
            async for piece in Engine.stream(self.engine, ask):
                yield piece
                raise ClusterError("gone")

    async def go():
        breaks = Breaks()
        async with Engine(OneRank(MODEL, STOP), TOKENIZER, "tiny") as breaks.engine:
            app, sent = make_app(breaks), []
            body = json.dumps({"prompt": "a", "stream": True}).encode()
            messages = [{"type": "http.request", "body": body, "more_body": False}]

            async def receive():
                return messages.pop() if messages else await asyncio.Event().wait()

            async def send(message):
                sent.append(message)

            headers = [(b"content-type", b"application/json"), (b"host", b"localhost")]
            scope = {"type": "http", "method": "POST", "path": "/v1/completions"}
            scope |= {"headers": headers, "client": ("127.0.0.1", 1), "query_string": b""}
            await asyncio.wait_for(app(scope, receive, send), 20)
            return b"".join(message.get("body", b"") for message in sent).decode()

    *_, event, end = asyncio.run(go()).split("\n\n")
    assert json.loads(event.removeprefix("data: "))["error"]["message"] == "gone" and end == ""
