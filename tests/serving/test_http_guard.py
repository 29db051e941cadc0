"""Who gets in over HTTP, with a token and without."""

import asyncio
import json

import pytest

from moe_router.serving.openai import make_app
from tests.serving.web import call, complete, served

SECRET = {"Authorization": "Bearer secret"}


@pytest.fixture(scope="module")
def port():
    with served() as (found, _):
        yield found


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
