"""Who may ask over HTTP: whoever has the token; without one, programs of this machine alone."""

import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from starlette.responses import JSONResponse

from moe_router.serving.exposure import is_loopback
from moe_router.serving.openai_types import error_body

_Scope = MutableMapping[str, Any]
_App = Callable[[_Scope, Any, Any], Awaitable[None]]
_OPEN = ("/health",)


class Guard:
    """ASGI middleware. /health is open to all: it says no more than whether the model answers.

    Args:
        token: clients send `Authorization: Bearer TOKEN`; None asks for none, and then neither
            other machines nor web pages in a browser of this one get in, whatever the address
            that the server listens on.
    """

    def __init__(self, app: _App, token: str | None) -> None:
        self._app = app
        self._want = None if token is None else f"Bearer {token}".encode()

    async def __call__(self, scope: _Scope, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["path"] in _OPEN:
            await self._app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        await (self._app if refusal is None else refusal)(scope, receive, send)

    def _refusal(self, scope: _Scope) -> JSONResponse | None:
        if self._want is not None:
            sent = _values(scope, b"authorization")
            # its time says nothing about the token
            if hmac.compare_digest(sent[0] if len(sent) == 1 else b"", self._want):
                return None
            body = error_body(
                "want the header `Authorization: Bearer TOKEN` with the server's token",
                "invalid_request_error",
                code="invalid_api_key",
            )
            return JSONResponse(body, 401, {"WWW-Authenticate": "Bearer"})
        host = scope["client"][0] if scope.get("client") else ""
        if is_loopback(host) and all(map(_names_this_machine, _values(scope, b"host"))):
            return None
        message = "a server without a token answers its own machine alone; start it with a token"
        return JSONResponse(error_body(message, "invalid_request_error", code="no_token"), 403)


def _values(scope: _Scope, name: bytes) -> list[bytes]:
    return [value for key, value in scope["headers"] if key == name]


def _names_this_machine(host: bytes) -> bool:
    """A page that has made its own name point to 127.0.0.1 still sends its own name."""
    try:
        return is_loopback(urlsplit(f"//{host.decode('latin-1')}").hostname or "")
    except ValueError:
        return False
