"""What stands before every gRPC method: the token, bounds on streams, time and size, status codes.

Clients' own deadlines need nothing here: gRPC cancels a call whose deadline has passed.
"""

import asyncio
import hmac
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message

from moe_router.errors import (
    CheckpointError,
    ClusterError,
    ConfigError,
    MoeRouterError,
    NonFiniteError,
    NotCausalError,
    QueueFullError,
    StaleEpochError,
    UnknownRouterError,
    WorkerLostError,
)

MAX_MESSAGE = 64 << 20  # bytes, both ways; a client that streams weights needs the same limit
MAX_STREAMS = 512  # open at once, of one server
MAX_CALLS = 1024  # streams and others: half of them is left to those that end soon
CALL_S = 60.0  # most seconds for one answer
SLOW_S = 30.0  # then a reader that takes no message is dropped
_log = logging.getLogger(__name__)

_STATUS: tuple[tuple[type[MoeRouterError], grpc.StatusCode], ...] = (  # the first that fits
    (UnknownRouterError, grpc.StatusCode.NOT_FOUND),
    (StaleEpochError, grpc.StatusCode.FAILED_PRECONDITION),
    (NotCausalError, grpc.StatusCode.FAILED_PRECONDITION),
    (QueueFullError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (ClusterError, grpc.StatusCode.UNAVAILABLE),
    (WorkerLostError, grpc.StatusCode.UNAVAILABLE),
    (CheckpointError, grpc.StatusCode.INTERNAL),
    (NonFiniteError, grpc.StatusCode.INTERNAL),
    (MoeRouterError, grpc.StatusCode.INVALID_ARGUMENT),
)
_Unary = Callable[[Any, Any], Awaitable[Any]]
_Stream = Callable[[Any, Any], AsyncIterator[Any]]


class Guard(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Checks the token before a method is looked up, or a byte of the request is taken.

    Args:
        token: None asks for none.
    """

    def __init__(self, token: str | None) -> None:
        self._want = None if token is None else f"Bearer {token}".encode()
        self._streams = 0

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], details: Any
    ) -> Any:
        if not self._admits(details.invocation_metadata):
            return grpc.stream_stream_rpc_method_handler(_turn_away)
        handler = await continuation(details)
        if handler is None:
            return None
        # requests come as bytes, so that those that are none get a status of ours
        read, codec = handler.request_deserializer, {}
        codec["response_serializer"] = handler.response_serializer
        if handler.unary_unary is not None:
            return grpc.unary_unary_rpc_method_handler(_answer(handler.unary_unary, read), **codec)
        if handler.unary_stream is not None:
            method = self._stream(handler.unary_stream, lambda raw: _parsed(read, raw))
            return grpc.unary_stream_rpc_method_handler(method, **codec)
        if handler.stream_stream is not None:
            method = self._stream(handler.stream_stream, lambda raws: _each_parsed(read, raws))
            return grpc.stream_stream_rpc_method_handler(method, **codec)
        return None  # there is no other kind here

    def _admits(self, metadata: Any) -> bool:
        if self._want is None:
            return True
        got = [value for name, value in metadata or () if name == "authorization"]
        sent = got[0] if len(got) == 1 else ""
        sent = sent if isinstance(sent, bytes) else sent.encode()
        return hmac.compare_digest(sent, self._want)  # its time says nothing about the token

    def _stream(self, method: _Stream, parse: Callable[[Any], Any]) -> _Unary:
        async def call(request: Any, context: Any) -> None:
            if self._streams >= MAX_STREAMS:
                await context.abort(*_too_many())
            self._streams += 1
            try:
                # at once: it travels with the first message else, and a status cannot follow
                # while that one is on its way
                await context.send_initial_metadata(())
                refusal = None
                try:
                    taken = await _send_all(method(parse(request), context), context)
                except grpc.aio.BaseError:
                    raise  # it is being ended, or the client has gone
                except Exception as error:
                    taken, refusal = True, _refusal(error)
                del request  # see `_answer`
                if not taken:
                    await _drop(context)
                if refusal is not None:
                    await context.abort(*refusal)
            finally:
                self._streams -= 1

        return call


async def _turn_away(requests: Any, context: Any) -> None:
    await context.abort(
        grpc.StatusCode.UNAUTHENTICATED, "authorization: want metadata `Bearer TOKEN`"
    )


def _answer(method: _Unary, read: Callable[[bytes], Any]) -> _Unary:
    async def call(request: bytes, context: Any) -> Any:
        try:
            return await _in_time(method(_parsed(read, request), context))
        except grpc.aio.BaseError:
            raise  # it is being ended, or the client has gone
        except Exception as error:
            refusal = _refusal(error)
        # what gRPC raises in `abort` is kept with the call, in a circle that waits for Python's
        # collector: outside of `except` and without the request it holds next to nothing
        del request
        await context.abort(*refusal)

    return call


async def _in_time(answer: Awaitable[Any]) -> Any:
    try:
        async with asyncio.timeout(CALL_S) as limit:
            reply = await answer
    except TimeoutError as error:
        if not limit.expired():
            raise
        raise _Refused(
            grpc.StatusCode.DEADLINE_EXCEEDED, f"no answer within {CALL_S:g} s; ask again later"
        ) from error
    _require_small(reply)
    return reply


async def _send_all(messages: Any, context: Any) -> bool:
    """False where the reader has no room for a message for too long: what is kept for one stream
    is at most a message."""
    async with aclosing(messages):
        async for message in messages:
            _require_small(message)
            try:
                async with asyncio.timeout(SLOW_S):
                    await context.write(message)
            except TimeoutError:
                return False
    return True


async def _drop(context: Any) -> None:
    """End the stream of a reader that does not read.

    The status stands behind the message that was not taken, so it is not waited for forever:
    gRPC keeps both until the reader takes them or goes away.
    """
    said = f"no message was read for {SLOW_S:g} s; read faster, or ask for less"
    try:
        async with asyncio.timeout(SLOW_S):
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, said)
    except TimeoutError:
        raise asyncio.CancelledError from None  # a method that just returns is taken for a bug


class _Refused(Exception):
    """Its arguments are a status code and what to say."""


def _require_small(message: Message) -> None:
    size = message.ByteSize()
    if size > MAX_MESSAGE:
        said = f"the answer has {size} bytes, want at most {MAX_MESSAGE}; ask for less at once"
        raise _Refused(grpc.StatusCode.RESOURCE_EXHAUSTED, said)


def _too_many() -> tuple[grpc.StatusCode, str]:
    said = f"{MAX_STREAMS} streams are open; close one, or come back later"
    return grpc.StatusCode.RESOURCE_EXHAUSTED, said


def _parsed(read: Callable[[bytes], Any], raw: bytes) -> Any:
    try:
        return read(raw)
    except DecodeError as error:
        raise ConfigError(
            f"request: {len(raw)} bytes that are no such message; use the server's router.proto"
        ) from error


async def _each_parsed(
    read: Callable[[bytes], Any], raws: AsyncIterator[bytes]
) -> AsyncIterator[Any]:
    async for raw in raws:
        yield _parsed(read, raw)


def _refusal(error: Exception) -> tuple[grpc.StatusCode, str]:
    """The status of an error. A bug of ours goes to the log, not to the client."""
    if isinstance(error, _Refused):
        code, said = error.args
        return code, said
    if isinstance(error, MoeRouterError):
        return next(code for kind, code in _STATUS if isinstance(error, kind)), str(error)
    _log.error("a gRPC method failed", exc_info=error)
    return grpc.StatusCode.INTERNAL, "internal error; the server's log has it"
