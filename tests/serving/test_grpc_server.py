"""The server under the services, over real connections on loopback."""

import asyncio
import re
import shutil
import subprocess
from functools import partial

import grpc
import pytest

from moe_router.errors import (
    CheckpointError,
    ClusterError,
    ConfigError,
    NotCausalError,
    StaleEpochError,
    UnknownRouterError,
)
from moe_router.serving import grpc_server
from moe_router.serving import router_pb2 as pb
from moe_router.serving.exposure import Tls
from moe_router.serving.grpc_guard import MAX_MESSAGE
from moe_router.serving.grpc_server import Adder, serve_grpc
from moe_router.serving.router_pb2_grpc import (
    GenerationServicer,
    GenerationStub,
    RouterStub,
    add_GenerationServicer_to_server,
)
from tests.tls import certificate

Code = grpc.StatusCode


class Echo(GenerationServicer):
    """Says how long the prompt was, twice; raises what it is told to."""

    def __init__(self, wrong: Exception | None = None) -> None:
        self.wrong = wrong

    async def Health(self, request, context):
        if self.wrong is not None:
            raise self.wrong
        return pb.HealthReply(ok=True)

    async def Generate(self, request, context):
        yield pb.GenerateEvent(text=str(len(request.text)))
        if self.wrong is not None:
            raise self.wrong
        yield pb.GenerateEvent(finish_reason="stop")


def added(servicer):
    return Adder("moe_router.v1.Generation", partial(add_GenerationServicer_to_server, servicer))


def talk(client, *, wrong=None, **options):
    """Serve Echo and run `client(channel)`."""

    async def go():
        add = added(Echo(wrong))
        server, port = await serve_grpc([add], **options)
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                return await client(channel)
        finally:
            await server.stop(None)

    return asyncio.run(go())


async def health(channel, metadata=None):
    return await GenerationStub(channel).Health(pb.HealthRequest(), metadata=metadata)


async def generate(channel, text="four", metadata=None):
    call = GenerationStub(channel).Generate(pb.GenerateRequest(text=text), metadata=metadata)
    return [event async for event in call]


def code_of(client, **options):
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        talk(client, **options)
    return refused.value.code(), refused.value.details()


def test_both_kinds_of_method_pass():
    assert talk(health).ok
    assert [event.text for event in talk(generate)] == ["4", ""]


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        (("authorization", "Bearer secre"),),
        (("authorization", "Bearer secrets"),),
        (("authorization", "secret"),),
        (("authorization", "bearer secret"),),
        (("authorization", ""),),
        (("authorization", "Bearer secret"), ("authorization", "Bearer secret")),
    ],
)
def test_without_the_very_token_nothing_is_answered(metadata):
    for client in (health, generate):
        code, said = code_of(partial(client, metadata=metadata), token="secret")
        assert code is Code.UNAUTHENTICATED and "secret" not in said


def test_the_token_opens():
    mine = (("authorization", "Bearer secret"),)
    assert talk(partial(health, metadata=mine), token="secret").ok
    assert len(talk(partial(generate, metadata=mine), token="secret")) == 2


def test_a_stranger_does_not_learn_which_methods_there_are():
    async def unknown(channel):
        return await RouterStub(channel).Route(pb.RouteRequest())

    assert code_of(unknown, token="secret")[0] is Code.UNAUTHENTICATED
    assert code_of(unknown)[0] is Code.UNIMPLEMENTED


@pytest.mark.parametrize(
    ("wrong", "code"),
    [
        (ConfigError("top_k=0: want 1"), Code.INVALID_ARGUMENT),
        (UnknownRouterError("router m/3: not registered"), Code.NOT_FOUND),
        (StaleEpochError("epoch 1: want 2"), Code.FAILED_PRECONDITION),
        (NotCausalError("routing looks ahead"), Code.FAILED_PRECONDITION),
        (ClusterError("gating service is gone"), Code.UNAVAILABLE),
        (CheckpointError("step_5: truncated"), Code.INTERNAL),
    ],
)
def test_our_errors_are_told_in_their_own_words(wrong, code):
    for client in (health, generate):
        assert code_of(client, wrong=wrong) == (code, str(wrong))


def test_a_bug_is_logged_and_not_told(caplog):
    for client in (health, generate):
        caplog.clear()
        code, said = code_of(client, wrong=KeyError("/home/me/secret.py"))
        assert code is Code.INTERNAL and "secret" not in said and "KeyError" not in said
        assert "/home/me/secret.py" in caplog.text


def test_a_request_beyond_the_limit_is_refused():
    code, _ = code_of(partial(generate, text="x" * (MAX_MESSAGE + 1)))
    assert code is Code.RESOURCE_EXHAUSTED
    assert talk(partial(generate, text="x" * (MAX_MESSAGE - 100)))[0].text


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_an_open_address_needs_a_token_and_tls(host):
    with pytest.raises(ConfigError, match=r"gRPC host=.*: want a token where others can") as said:
        talk(health, host=host, insecure=True)
    assert "\n" not in str(said.value)
    with pytest.raises(ConfigError, match=r"gRPC host=.*: want TLS where others can") as said:
        talk(health, host=host, token="secret")
    assert "\n" not in str(said.value) and "insecure=true" in str(said.value)


def test_an_open_address_without_tls_has_to_be_asked_for():
    mine = (("authorization", "Bearer secret"),)
    options = {"host": "0.0.0.0", "token": "secret", "insecure": True}
    assert talk(partial(health, metadata=mine), **options).ok
    assert code_of(health, **options)[0] is Code.UNAUTHENTICATED


@pytest.mark.parametrize("token", ["", "two words", "schlüssel", "line\nfeed"])
def test_a_token_that_cannot_be_sent_is_refused_and_not_shown(token):
    with pytest.raises(ConfigError, match=r"gRPC token=.* characters: want") as said:
        talk(health, token=token)
    assert not token or token not in str(said.value)


def test_calls_at_once_are_bounded(monkeypatch):
    """Those beyond are refused at once, and there is room again when others end."""
    monkeypatch.setattr(grpc_server, "MAX_CALLS", 4)

    class Slow(Echo):
        async def Health(self, request, context):
            await asyncio.sleep(0.5)
            return pb.HealthReply(ok=True)

    async def go():
        server, port = await serve_grpc([added(Slow())])
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                asked = await asyncio.gather(
                    *(health(channel) for _ in range(12)), return_exceptions=True
                )
                return asked, await health(channel)
        finally:
            await server.stop(None)

    asked, later = asyncio.run(go())
    refused = [each for each in asked if isinstance(each, grpc.aio.AioRpcError)]
    # of one connection HTTP/2 refuses more streams, if it comes to that before the server does
    assert {each.code() for each in refused} <= {Code.RESOURCE_EXHAUSTED, Code.UNAVAILABLE}
    assert later.ok and len(asked) - len(refused) >= 4


def test_a_taken_port_is_refused():
    async def twice():
        server, port = await serve_grpc([])
        try:
            await serve_grpc([], port=port)
        finally:
            await server.stop(None)

    with pytest.raises(ConfigError, match=r"cannot listen on 127\.0\.0\.1:.*; want a free port"):
        asyncio.run(twice())


def by_tls(pem, **options):
    """`health` of a server with these PEM files."""

    async def go():
        server, port = await serve_grpc([added(Echo())], tls=pem, token="secret", **options)
        try:
            trust = grpc.ssl_channel_credentials(pem.certificate.read_bytes())
            async with grpc.aio.secure_channel(f"localhost:{port}", trust) as channel:
                return await health(channel, (("authorization", "Bearer secret"),))
        finally:
            await server.stop(None)

    return asyncio.run(go())


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_tls(tmp_path, host):
    assert by_tls(Tls(*certificate(tmp_path)), host=host).ok


def test_the_command_in_the_message_makes_what_is_wanted(tmp_path):
    with pytest.raises(ConfigError) as said:
        talk(health, host="0.0.0.0", token="secret")
    (command,) = re.findall(r"openssl [^)]*", str(said.value))
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl, to run the command of the message")
    made = command.replace("NAME", "localhost").split()
    subprocess.run(made, cwd=tmp_path, check=True, capture_output=True)
    assert by_tls(Tls(tmp_path / "cert.pem", tmp_path / "key.pem"), host="0.0.0.0").ok


def test_a_missing_certificate_is_said(tmp_path):
    with pytest.raises(ConfigError, match=r"gRPC TLS: .*key.pem cannot be read"):
        talk(health, tls=Tls(tmp_path / "cert.pem", tmp_path / "key.pem"))
