"""The HTTP front over a real server on loopback, and a real engine behind it."""

import asyncio
import http.client
import json
import threading
from contextlib import contextmanager

import pytest
import uvicorn

from moe_router.config import ServeConfig
from moe_router.errors import ClusterError, PeerLostError
from moe_router.models import Sampling, generate
from moe_router.serving.engine import Engine
from moe_router.serving.group import OneRank
from moe_router.serving.openai import MAX_BODY, make_app
from moe_router.serving.scheduler import Limits
from tests.serving.work import TOKENIZER, byte_model

MODEL = byte_model()
STOP = TOKENIZER.document_id
SECRET = {"Authorization": "Bearer secret"}


class Counting(OneRank):
    """Counts passes; `lost` breaks the next one."""

    def __init__(self):
        super().__init__(MODEL, STOP)
        self.passes, self.lost = 0, False

    async def step(self, work):
        self.passes += 1
        if self.lost:
            raise PeerLostError("rank 0 died")
        return await super().step(work)


@contextmanager
def served(token=None, **limits):
    """The port of a server in a thread, and its group."""
    group, ready, ports = Counting(), threading.Event(), []

    async def run():
        defaults = ServeConfig(max_new_tokens=6)
        async with Engine(group, TOKENIZER, "tiny", defaults, Limits(**limits)) as engine:
            config = uvicorn.Config(
                make_app(engine, token), port=0, log_level="critical", lifespan="off", ws="none"
            )
            server = uvicorn.Server(config)
            task = asyncio.ensure_future(server.serve())
            while not server.started:
                await asyncio.sleep(0.01)
            ports.append(server.servers[0].sockets[0].getsockname()[1])
            ends.append((asyncio.get_running_loop(), server))
            ready.set()
            await task

    ends = []
    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    assert ready.wait(20)
    try:
        yield ports[0], group
    finally:
        ends[0][1].should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def port():
    with served(slots=8) as (found, _):
        yield found


def call(port, method, path, body=None, headers=()):
    """Status, body as text, headers."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    raw = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    kind = {"Content-Type": "application/json"} if body is not None else {}
    connection.request(method, path, raw, kind | dict(headers))
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, text, answer.headers


def complete(port, prompt="The ", headers=(), **asked):
    status, text, _ = call(port, "POST", "/v1/completions", {"prompt": prompt, **asked}, headers)
    return status, json.loads(text)


def stream(port, prompt="The ", **asked):
    """The data of each event."""
    body = {"prompt": prompt, "stream": True, **asked}
    status, text, headers = call(port, "POST", "/v1/completions", body)
    assert status == 200 and headers["content-type"].startswith("text/event-stream")
    *events, end = text.split("\n\n")
    assert end == "" and all(event.startswith("data: ") for event in events)
    return [event.removeprefix("data: ") for event in events]


def wanted(prompt, **sampling):
    ids = [STOP, *prompt.encode()] if isinstance(prompt, str) else prompt
    return TOKENIZER.decode(generate(MODEL, [ids], Sampling(**sampling), stop_id=STOP)[0])


def test_a_completion_is_the_text_of_generate(port):
    status, body = complete(port, model="tiny", max_tokens=9, temperature=1, seed=3)
    assert status == 200
    (choice,) = body["choices"]
    assert choice == {
        "text": wanted("The ", max_new_tokens=9, temperature=1.0, seed=3),
        "index": 0,
        "logprobs": None,
        "finish_reason": "length",
    }
    assert body["usage"] == {"prompt_tokens": 5, "completion_tokens": 9, "total_tokens": 14}
    assert (body["object"], body["model"]) == ("text_completion", "tiny")
    assert body["id"].startswith("cmpl-")


def test_a_stream_is_the_same_text_in_pieces(port):
    asked = {"max_tokens": 9, "temperature": 1, "seed": 3}
    *events, done = stream(port, **asked, stream_options={"include_usage": True})
    assert done == "[DONE]"
    *chunks, last = map(json.loads, events)
    texts = [chunk["choices"][0]["text"] for chunk in chunks]
    assert "".join(texts) == complete(port, **asked)[1]["choices"][0]["text"] and len(texts) > 2
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (
        len(chunks) - 1
    ) + ["length"]
    assert all(chunk["usage"] is None for chunk in chunks) and last["choices"] == []
    assert last["usage"]["completion_tokens"] == 9
    assert len({chunk["id"] for chunk in [*chunks, last]}) == 1
    assert "usage" not in json.loads(stream(port, **asked)[0])


@pytest.mark.parametrize(
    ("prompt", "each"),
    [
        (["The ", "a"], ["The ", "a"]),
        ([256, 84], [[256, 84]]),
        ([[256, 84], [97]], [[256, 84], [97]]),
        ("", [[256]]),
    ],
)
def test_every_form_of_a_prompt(port, prompt, each):
    _, body = complete(port, prompt, seed=1, temperature=0.9)
    texts = [wanted(one, max_new_tokens=6, temperature=0.9, seed=1) for one in each]
    assert [choice["text"] for choice in body["choices"]] == texts
    assert [choice["index"] for choice in body["choices"]] == list(range(len(each)))


def test_a_stop_string_is_obeyed(port):
    whole = wanted("The ", max_new_tokens=30, temperature=1.0, seed=1)
    stop = whole[4:6]
    asked = {"max_tokens": 30, "temperature": 1, "seed": 1, "stop": stop}
    (choice,) = complete(port, **asked)[1]["choices"]
    assert (choice["text"], choice["finish_reason"]) == (whole[: whole.index(stop)], "stop")
    assert complete(port, **{**asked, "stop": ["nowhere", stop]})[1]["choices"] == [choice]


@pytest.mark.parametrize(
    ("body", "status", "message", "param"),
    [
        (
            {"prompt": "a", "tempo": 1},
            400,
            "Unrecognized request argument supplied: tempo",
            "tempo",
        ),
        ({"prompt": 3}, 400, "prompt: want a text, a list of texts, a list of token ids", "prompt"),
        ({"prompt": []}, 400, "prompt=nothing: want at least one prompt", None),
        ({}, 400, "prompt: want a text", "prompt"),
        ({"prompt": "a", "n": 2}, 400, "n=2: Input should be 1", "n"),
        (
            {"prompt": "a", "temperature": 3},
            400,
            "temperature=3: Input should be less",
            "temperature",
        ),
        ({"prompt": "a", "max_tokens": "5"}, 400, 'max_tokens="5": Input should be a valid', None),
        ({"prompt": "a", "stop": ["a"] * 5}, 400, "stop: want a text or up to 4 texts", "stop"),
        ({"prompt": [1, 999]}, 400, "prompt 0 holds token 999: want 0..256", None),
        (
            {"prompt": "a", "model": "gpt"},
            404,
            "The model `gpt` does not exist: want `tiny`",
            "model",
        ),
        ({"prompt": "a", "max_tokens": 10**7}, 400, "prompt + max_tokens=10000002: want", None),
        (b"[1", 400, "the body is no JSON object", None),
        (b'{"prompt": "a", "temperature": NaN}', 400, "temperature=NaN", "temperature"),
        (b" " * (MAX_BODY + 1), 413, "the body is too long: want at most", None),
    ],
)
def test_errors_have_the_format_of_openai(port, body, status, message, param):
    got, text, _ = call(port, "POST", "/v1/completions", body)
    error = json.loads(text)["error"]
    assert got == status and error["message"].startswith(message)
    assert error["type"] == "invalid_request_error" and error.keys() >= {"param", "code"}
    assert param is None or error["param"] == param


def test_an_error_of_a_streamed_request_has_its_own_status(port):
    assert complete(port, [1, 999], stream=True)[0] == 400


def test_other_routes(port):
    assert json.loads(call(port, "GET", "/health")[1]) == {"status": "ok", "model": "tiny"}
    (model,) = json.loads(call(port, "GET", "/v1/models")[1])["data"]
    assert (model["id"], model["object"]) == ("tiny", "model")
    status, text, _ = call(port, "GET", "/v1/nowhere")
    assert status == 404 and json.loads(text)["error"]["message"] == "Not Found"
    assert call(port, "GET", "/v1/completions")[0] == 405


def test_with_a_token_every_route_but_health_wants_it():
    with served("secret") as (port, _):
        wrong = [(), {"Authorization": "Bearer secre"}, {"Authorization": "secret"}]
        for headers in wrong:
            status, text, got = call(port, "GET", "/v1/models", headers=headers)
            assert status == 401 and got["WWW-Authenticate"] == "Bearer"
            assert json.loads(text)["error"]["code"] == "invalid_api_key"
            assert complete(port, headers=headers)[0] == 401
        assert call(port, "GET", "/nowhere")[0] == 401
        assert call(port, "GET", "/health")[0] == 200
        assert call(port, "GET", "/v1/models", headers=SECRET)[0] == 200
        assert complete(port, headers={**SECRET, "Host": "example.org"})[0] == 200


def test_without_a_token_a_web_page_gets_nothing(port):
    for host in ("evil.example", "evil.example:80", "10.0.0.1"):
        assert complete(port, headers={"Host": host})[0] == 403
    for host in ("localhost:8000", "[::1]:8000", "127.0.0.1"):
        assert complete(port, headers={"Host": host})[0] == 200
    plain = {"Content-Type": "text/plain"}
    assert call(port, "POST", "/v1/completions", {"prompt": "a"}, plain)[0] == 415


def test_without_a_token_other_machines_get_nothing():
    async def ask(client):
        sent = []
        scope = {"type": "http", "method": "GET", "path": "/v1/models", "query_string": b""}
        scope |= {"headers": [(b"host", b"127.0.0.1")], "client": client}

        async def send(message):
            sent.append(message)

        await make_app(None)(scope, None, send)
        return sent[0]["status"]

    for client in (("10.1.2.3", 5), None):
        assert asyncio.run(ask(client)) == 403


@pytest.mark.parametrize("streamed", [True, False])
def test_who_hangs_up_is_forgotten(streamed):
    with served(slots=1) as (port, group):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        body = json.dumps({"prompt": "a", "max_tokens": 20_000, "stream": streamed})
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
        assert complete(port, max_tokens=2)[0] == 200
        assert group.passes < 2_000


def test_a_full_queue_is_429_and_says_when_to_come_back():
    with served(slots=1, queue=1) as (port, _):
        answers = []
        body = {"prompt": "a", "max_tokens": 300}

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
