"""The gRPC server under both services of `router.proto`: token, TLS, limits, status codes.

It covers services whose methods take one request and answer with one message or an async
generator of them; a method that streams requests is refused as unimplemented.
"""

import hmac
import ipaddress
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from moe_router.config import require
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

Adder = Callable[[Any], None]
"""Adds one servicer to a server: `partial(add_RouterServicer_to_server, servicer)`."""

MAX_MESSAGE = 64 << 20  # bytes, both ways; a client that streams weights needs the same limit
_MAX_METADATA = 8 << 10  # bytes; a token is some hundred
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


@dataclass(frozen=True, slots=True)
class Tls:
    """PEM files: the server's certificate chain, and its private key."""

    certificate: Path
    key: Path


async def serve_grpc(
    adders: Sequence[Adder],
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    token: str | None = None,
    tls: Tls | None = None,
) -> tuple[Any, int]:
    """Start a server on the running event loop.

    Args:
        adders: each adds one servicer.
        host: an address of this machine; anything but loopback needs a token.
        port: 0 lets the system choose.
        token: clients send it as metadata `authorization: Bearer TOKEN`; None asks for none.
        tls: None is plain text.

    Returns:
        The started grpc.aio.Server, whose `stop(grace)` the caller awaits, and the bound port.

    Raises:
        ConfigError: no token on an open address, a bad token, an unreadable PEM file, or a port
            that is taken.
    """
    _require_token(host, token)
    server = grpc.aio.server(
        interceptors=[_Guard(token)],
        options=[
            ("grpc.max_receive_message_length", MAX_MESSAGE),
            ("grpc.max_send_message_length", MAX_MESSAGE),
            ("grpc.max_metadata_size", _MAX_METADATA),
            ("grpc.so_reuseport", 0),  # else a second server would share the port unnoticed
        ],
    )
    for add in adders:
        add(server)
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        if tls is None:
            bound = server.add_insecure_port(where)
        else:
            bound = server.add_secure_port(where, _credentials(tls))
    except RuntimeError as error:
        raise ConfigError(
            f"gRPC server: cannot listen on {where}; want a free port of this machine, or port 0"
        ) from error
    await server.start()
    return server, int(bound)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # a name: who knows where it leads


def _require_token(host: str, token: str | None) -> None:
    if token is None:
        require(
            is_loopback(host),
            "gRPC host",
            host,
            "a token where others can connect; set one, or listen on 127.0.0.1",
        )
        return
    sound = bool(token) and token.isascii() and token.isprintable() and " " not in token
    # the token itself is never shown
    require(sound, "gRPC token", f"{len(token)} characters", "printable ASCII without spaces")


def _credentials(tls: Tls) -> Any:
    try:
        pair = (tls.key.read_bytes(), tls.certificate.read_bytes())
    except OSError as error:
        raise ConfigError(
            f"gRPC TLS: {error.filename} cannot be read ({error.strerror}); want a PEM file"
        ) from error
    return grpc.ssl_server_credentials([pair])


class _Guard(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Checks the token before a method is looked up; turns errors into status codes."""

    def __init__(self, token: str | None) -> None:
        self._want = None if token is None else f"Bearer {token}".encode()

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], details: Any
    ) -> Any:
        if not self._admits(details.invocation_metadata):
            return grpc.unary_unary_rpc_method_handler(_turn_away)
        handler = await continuation(details)
        if handler is None or handler.request_streaming:
            return None
        codec = {
            "request_deserializer": handler.request_deserializer,
            "response_serializer": handler.response_serializer,
        }
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(_stream(handler.unary_stream), **codec)
        return grpc.unary_unary_rpc_method_handler(_answer(handler.unary_unary), **codec)

    def _admits(self, metadata: Any) -> bool:
        if self._want is None:
            return True
        got = [value for name, value in metadata or () if name == "authorization"]
        sent = got[0] if len(got) == 1 else ""
        sent = sent if isinstance(sent, bytes) else sent.encode()
        return hmac.compare_digest(sent, self._want)  # its time says nothing about the token


async def _turn_away(request: Any, context: Any) -> None:
    await context.abort(
        grpc.StatusCode.UNAUTHENTICATED, "authorization: want metadata `Bearer TOKEN`"
    )


def _answer(method: Callable[[Any, Any], Awaitable[Any]]) -> Callable[[Any, Any], Awaitable[Any]]:
    async def call(request: Any, context: Any) -> Any:
        try:
            return await method(request, context)
        except Exception as error:
            await _refuse(error, context)

    return call


def _stream(
    method: Callable[[Any, Any], AsyncIterator[Any]],
) -> Callable[[Any, Any], AsyncIterator[Any]]:
    async def call(request: Any, context: Any) -> AsyncIterator[Any]:
        try:
            async for message in method(request, context):
                yield message
        except Exception as error:
            await _refuse(error, context)

    return call


async def _refuse(error: Exception, context: Any) -> None:
    """End the call with the error's status. A bug of ours goes to the log, not to the client."""
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if isinstance(error, MoeRouterError):
        code = next(code for kind, code in _STATUS if isinstance(error, kind))
        await context.abort(code, str(error))
    _log.error("a gRPC method failed", exc_info=error)
    await context.abort(grpc.StatusCode.INTERNAL, "internal error; the server's log has it")
