"""The gRPC server under both services of `router.proto`: addresses, TLS, limits, reflection.

It covers services whose methods are unary, or stream; `grpc_guard` stands before each of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from grpc_reflection.v1alpha import reflection

from moe_router.config import require
from moe_router.errors import ConfigError
from moe_router.serving.exposure import Tls, require_guarded
from moe_router.serving.grpc_guard import MAX_CALLS, MAX_MESSAGE, Guard

_MAX_METADATA = 8 << 10  # bytes; a token is some hundred


@dataclass(frozen=True, slots=True)
class Adder:
    """One servicer for a server.

    Attributes:
        service: its full name, as reflection tells it.
        add: `partial(add_RouterServicer_to_server, servicer)`.
    """

    service: str
    add: Callable[[Any], None]


async def serve_grpc(
    adders: Sequence[Adder],
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    token: str | None = None,
    tls: Tls | None = None,
    insecure: bool = False,
) -> tuple[Any, int]:
    """Start a server on the running event loop. It tells by reflection what can be asked.

    Args:
        adders: each adds one servicer.
        host: an address of this machine; anything but loopback needs a token and TLS.
        port: 0 lets the system choose.
        token: clients send it as metadata `authorization: Bearer TOKEN`; None asks for none.
        tls: None is plain text.
        insecure: plain text on any address, for something else encrypts.

    Returns:
        The started grpc.aio.Server, whose `stop(grace)` the caller awaits, and the bound port.

    Raises:
        ConfigError: an open address without a token or TLS, a bad token, an unreadable PEM file,
            or a port that is taken.
    """
    require_guarded("gRPC host", host, token=token, tls=tls, insecure=insecure)
    _require_sound(token)
    server = grpc.aio.server(
        interceptors=[Guard(token)],
        maximum_concurrent_rpcs=MAX_CALLS,
        options=[
            ("grpc.max_receive_message_length", MAX_MESSAGE),
            ("grpc.max_send_message_length", MAX_MESSAGE),
            ("grpc.max_metadata_size", _MAX_METADATA),
            ("grpc.max_concurrent_streams", MAX_CALLS),  # of one connection
            ("grpc.keepalive_time_ms", 60_000),  # a client whose machine died ends no stream
            ("grpc.so_reuseport", 0),  # else a second server would share the port unnoticed
        ],
    )
    for adder in adders:
        adder.add(server)
    reflection.enable_server_reflection(
        [*(adder.service for adder in adders), reflection.SERVICE_NAME], server
    )
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


def _require_sound(token: str | None) -> None:
    if token is None:
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
