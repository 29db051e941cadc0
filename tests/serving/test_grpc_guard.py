"""What stands before every method: sizes, time, streams, readers that do not read."""

import asyncio
import time
from functools import partial

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_router.serving import grpc_guard
from moe_router.serving import router_pb2 as pb
from moe_router.serving.grpc_guard import MAX_MESSAGE
from moe_router.serving.grpc_server import Adder, serve_grpc
from moe_router.serving.router_pb2_grpc import (
    GenerationServicer,
    GenerationStub,
    add_GenerationServicer_to_server,
)

Code = grpc.StatusCode


class Text(GenerationServicer):
    """`health` and `generate` stand for the methods; `ended` is set once a call of them is over."""

    def __init__(self, health=None, generate=None):
        self.health, self.generate = health, generate
        self.ended = asyncio.Event()

    async def Health(self, request, context):
        try:
            return await self.health()
        finally:
            self.ended.set()

    async def Generate(self, request, context):
        try:
            async for event in self.generate(request):
                yield event
        finally:
            self.ended.set()


def talk(client, servicer=None, **options):
    """Serve, and run `client(channel)`."""

    async def go():
        made = Text() if servicer is None else servicer
        add = partial(add_GenerationServicer_to_server, made)
        server, port = await serve_grpc([Adder("moe_router.v1.Generation", add)], **options)
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                return await asyncio.wait_for(client(channel), 60)
        finally:
            await server.stop(None)

    return asyncio.run(go())


async def code_of(call):
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call
    said = refused.value.details()
    assert "\n" not in said
    return refused.value.code(), said


# --- sizes -----------------------------------------------------------------------------------


async def large():
    return pb.HealthReply(reason="x" * MAX_MESSAGE)


async def large_events(request):
    yield pb.GenerateEvent(text="first")
    yield pb.GenerateEvent(text="x" * MAX_MESSAGE)


def test_an_answer_beyond_the_limit_is_refused_and_the_server_lives():
    async def client(channel):
        stub = GenerationStub(channel)
        whole = await code_of(stub.Health(pb.HealthRequest()))
        stream = stub.Generate(pb.GenerateRequest())
        first = (await stream.read()).text
        return whole, first, await code_of(stream.read())

    whole, first, streamed = talk(client, Text(large, large_events))
    assert whole == streamed and first == "first"
    code, said = whole
    assert code is Code.RESOURCE_EXHAUSTED
    assert said == f"the answer has {MAX_MESSAGE + 5} bytes, want at most {MAX_MESSAGE}; " + (
        "ask for less at once"
    )


async def counted(request):
    yield pb.GenerateEvent(text=str(len(request.text)))


def test_bytes_that_are_no_message_are_refused_in_one_line():
    """Random bytes to a unary method and to one that streams, and the server goes on."""
    methods = {"Health": "unary_unary", "Generate": "unary_stream"}

    async def ask(channel, name, raw):
        call = getattr(channel, methods[name])(f"/moe_router.v1.Generation/{name}")(raw)
        try:
            await (call if name == "Health" else call.read())
        except grpc.aio.AioRpcError as error:
            return error.code(), error.details()
        return Code.OK, ""

    async def well():
        return pb.HealthReply(ok=True)

    async def client(channel):
        loop = asyncio.get_running_loop()

        @settings(max_examples=15, deadline=None)
        @given(st.binary(max_size=64))
        def any_bytes(raw):
            for name in methods:
                asked = asyncio.run_coroutine_threadsafe(ask(channel, name, raw), loop)
                code, said = asked.result(20)
                assert code in (Code.OK, Code.INVALID_ARGUMENT), said

        await asyncio.to_thread(any_bytes)
        for name in methods:
            code, said = await ask(channel, name, b"\xff\xff\xff")
            assert code is Code.INVALID_ARGUMENT
            assert said == (
                "request: 3 bytes that are no such message; use the server's router.proto"
            )
        return await ask(channel, "Health", b"")

    assert talk(client, Text(well, counted)) == (Code.OK, "")


# --- time ------------------------------------------------------------------------------------


async def never():
    await asyncio.Event().wait()


def test_a_call_ends_at_the_clients_deadline_on_the_server_too():
    async def client(channel, servicer):
        call = GenerationStub(channel).Health(pb.HealthRequest(), timeout=0.3)
        code, _ = await code_of(call)
        await asyncio.wait_for(servicer.ended.wait(), 5)
        return code

    servicer = Text(never)
    assert talk(partial(client, servicer=servicer), servicer) is Code.DEADLINE_EXCEEDED


def test_a_call_without_a_deadline_has_the_servers(monkeypatch):
    monkeypatch.setattr(grpc_guard, "CALL_S", 0.2)

    async def client(channel):
        return await code_of(GenerationStub(channel).Health(pb.HealthRequest()))

    code, said = talk(client, Text(never))
    assert (code, said) == (Code.DEADLINE_EXCEEDED, "no answer within 0.2 s; ask again later")


# --- streams ---------------------------------------------------------------------------------


async def slowly(request):
    yield pb.GenerateEvent(text="first")
    await asyncio.Event().wait()


def test_streams_are_bounded_and_leave_room_for_calls(monkeypatch):
    monkeypatch.setattr(grpc_guard, "MAX_STREAMS", 3)

    async def client(channel):
        stub = GenerationStub(channel)
        held = [stub.Generate(pb.GenerateRequest()) for _ in range(3)]
        for stream in held:
            assert (await stream.read()).text == "first"
        code, said = await code_of(stub.Generate(pb.GenerateRequest()).read())
        assert (code, said) == (
            Code.RESOURCE_EXHAUSTED,
            "3 streams are open; close one, or come back later",
        )
        assert (await stub.Health(pb.HealthRequest())).ok
        held.pop().cancel()
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:  # the server hears of it a little later
            stream = stub.Generate(pb.GenerateRequest())
            try:
                return (await stream.read()).text
            except grpc.aio.AioRpcError:
                await asyncio.sleep(0.02)
        pytest.fail("a stream that was closed left no room")

    async def well():
        return pb.HealthReply(ok=True)

    assert talk(client, Text(well, slowly)) == "first"


def test_a_reader_that_does_not_read_is_dropped(monkeypatch):
    monkeypatch.setattr(grpc_guard, "SLOW_S", 0.3)
    made = []

    async def endless(request):
        while True:
            made.append(1)
            yield pb.GenerateEvent(text="x" * (1 << 20))

    async def client(channel, servicer):
        stream = GenerationStub(channel).Generate(pb.GenerateRequest())
        await stream.read()
        await asyncio.wait_for(servicer.ended.wait(), 20)
        kept = len(made)
        with pytest.raises(grpc.aio.AioRpcError) as dropped:
            while await stream.read() is not grpc.aio.EOF:
                pass
        return kept, dropped.value

    servicer = Text(generate=endless)
    kept, dropped = talk(partial(client, servicer=servicer), servicer)
    assert kept <= 64  # MiB, of both ends: what gRPC and the kernel hold
    assert dropped.code() is Code.RESOURCE_EXHAUSTED
    assert dropped.details() == "no message was read for 0.3 s; read faster, or ask for less"


# --- the token -------------------------------------------------------------------------------


def test_without_the_token_no_byte_of_a_request_is_taken():
    """A stranger that announces a request and never sends it is turned away all the same."""

    async def client(channel):
        async def nothing():
            await asyncio.Event().wait()
            yield b""

        call = channel.stream_unary("/moe_router.v1.Generation/Health")(nothing())
        return await asyncio.wait_for(code_of(call), 10)

    code, _ = talk(client, Text(never), token="secret")
    assert code is Code.UNAUTHENTICATED
