"""A real HTTP server on loopback over a real engine, and a client for it."""

import asyncio
import http.client
import json
import threading
from contextlib import contextmanager

import uvicorn

from moe_router.config import ServeConfig, require
from moe_router.errors import WorkerLostError
from moe_router.serving.demo import add_page
from moe_router.serving.engine import Engine
from moe_router.serving.group import OneRank
from moe_router.serving.openai import make_app
from moe_router.serving.requests import Facts
from moe_router.serving.scheduler import Limits
from tests.serving.work import TOKENIZER, byte_model

MODEL = byte_model()
STOP = TOKENIZER.document_id


class Counting(OneRank):
    """Counts passes; `lost` breaks the next one."""

    def __init__(self, model, tokenizer, shifts=None):
        super().__init__(model, tokenizer.document_id, shifts, remember=1024)
        self.passes, self.lost, self.served = 0, False, model

    async def step(self, work):
        self.passes += 1
        if self.lost:
            raise WorkerLostError("rank 0 died")
        return await super().step(work)


class WatchedEngine(Engine):
    """The engine, as a page may look into it."""

    async def facts(self):
        model = self._group.served
        experts = tuple(block.moe.config.experts if block.moe else 0 for block in model.blocks)
        homes = tuple((0,) for _ in range(max(experts)))
        depth = model.config.routing
        return Facts(self.model, experts, homes, 1, depth.kind if depth else "")

    async def kill(self, rank):
        require(rank == 0, "rank", rank, "0")
        self._group.lost = True


@contextmanager
def served(
    token=None,
    page=False,
    chaos=False,
    model=MODEL,
    tokenizer=TOKENIZER,
    shifts=None,
    together_s=0.0,
    **limits,
):
    """The port of a server in a thread, and its group; each token is a piece of its own."""
    group, ready, ports = Counting(model, tokenizer, shifts), threading.Event(), []

    async def run():
        defaults = ServeConfig(max_new_tokens=6)
        how = (defaults, Limits(**limits), together_s)
        async with WatchedEngine(group, tokenizer, "tiny", *how) as engine:
            app = make_app(engine, token)
            if page:
                add_page(app, engine, chaos=chaos)
            config = uvicorn.Config(app, port=0, log_level="critical", lifespan="off", ws="none")
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
