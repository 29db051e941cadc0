"""A real HTTP server on loopback over a real engine, and a client for it."""

import asyncio
import http.client
import json
import threading
from contextlib import contextmanager

import uvicorn

from moe_router.config import ServeConfig
from moe_router.errors import PeerLostError
from moe_router.serving.engine import Engine
from moe_router.serving.group import OneRank
from moe_router.serving.openai import make_app
from moe_router.serving.scheduler import Limits
from tests.serving.work import TOKENIZER, byte_model

MODEL = byte_model()
STOP = TOKENIZER.document_id


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
