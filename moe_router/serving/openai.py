"""HTTP in OpenAI's format: /v1/completions and /v1/chat/completions, streamed or whole, /v1/models,
/metrics for Prometheus, /health, and /openapi.json."""

import asyncio
import json
import logging
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response, StreamingResponse

from moe_router.errors import ClusterError, MoeRouterError, QueueFullError, WorkerLostError
from moe_router.serving.http_guard import Guard
from moe_router.serving.meters import CONTENT_TYPE
from moe_router.serving.openai_chat import ChatFormat, ChatRequest
from moe_router.serving.openai_types import (
    CompletionFormat,
    CompletionRequest,
    FieldError,
    error_body,
    usage,
)
from moe_router.serving.openapi import document
from moe_router.serving.requests import Piece
from moe_router.serving.service import Service

MAX_BODY = 4 << 20  # bytes: a prompt of a million token ids
_RETRY_S = 5  # about what it takes to make a lost rank anew
_GONE = 499  # nginx's number for a client that went away; nobody reads it
Asked = CompletionRequest | ChatRequest
Format = CompletionFormat | ChatFormat
Answer = TypeVar("Answer")
_log = logging.getLogger(__name__)


def make_app(service: Service, token: str | None = None) -> FastAPI:
    """The routes over `service`.

    Args:
        token: asked of every route but /health; None: see `Guard`.
    """
    # no pages of documentation: they would load scripts from elsewhere; its own document knows
    # nothing of bodies that are read here
    app = FastAPI(title="moe-router", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Guard, token=token)
    for kind in (MoeRouterError, HTTPException):
        app.add_exception_handler(kind, _answer_error)
    app.add_exception_handler(Exception, _answer_error)
    front = _Front(service)
    app.add_api_route("/health", front.health, methods=["GET"])
    app.add_api_route("/openapi.json", front.document, methods=["GET"])
    app.add_api_route("/metrics", front.metrics, methods=["GET"])
    app.add_api_route("/v1/models", front.models, methods=["GET"])
    app.add_api_route("/v1/completions", front.completions, methods=["POST"])
    app.add_api_route("/v1/chat/completions", front.chat, methods=["POST"])
    return app


class _Front:
    def __init__(self, service: Service) -> None:
        self._service = service
        self._began = int(time.time())

    async def health(self) -> Response:
        health = await self._service.health()
        if health.ok:
            return JSONResponse({"status": "ok", "model": health.model})
        body = {"status": "unavailable", "model": health.model, "reason": health.reason}
        return JSONResponse(body, 503, {"Retry-After": str(_RETRY_S)})

    async def document(self) -> Response:
        return JSONResponse(document(self._service.model))

    async def metrics(self) -> Response:
        return Response(await self._service.metrics(), media_type=CONTENT_TYPE)

    async def models(self) -> Response:
        model = {"id": self._service.model, "object": "model", "created": self._began}
        return JSONResponse({"object": "list", "data": [model | {"owned_by": "moe-router"}]})

    async def completions(self, request: Request) -> Response:
        asked = CompletionRequest.read(await read_body(request))
        style = CompletionFormat(self._service.model, logprobs=asked.logprobs is not None)
        return await self._answer(request, asked, style)

    async def chat(self, request: Request) -> Response:
        asked = ChatRequest.read(await read_body(request))
        style = ChatFormat(self._service.model, logprobs=bool(asked.logprobs))
        return await self._answer(request, asked, style)

    async def _answer(self, request: Request, asked: Asked, style: Format) -> Response:
        model = self._service.model
        if asked.model is not None and asked.model != model:
            body = error_body(
                f"The model `{asked.model}` does not exist: want `{model}`",
                "invalid_request_error",
                code="model_not_found",
                param="model",
            )
            return JSONResponse(body, 404)
        pieces = self._service.stream(asked.ask)
        if not asked.stream:
            return await unless_gone(request, _whole(pieces, style))
        # the first piece is awaited here: what is wrong with a request has a status of its own
        first = await unless_gone(request, anext(pieces))
        events = _events(first, pieces, style, asked.with_usage)
        return StreamingResponse(
            events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
        )


async def _whole(pieces: AsyncGenerator[Piece], style: Format) -> Response:
    got: dict[int, list[Piece]] = defaultdict(list)
    async with aclosing(pieces):
        async for piece in pieces:
            got[piece.index].append(piece)
    choices = []
    for index, of in sorted(got.items()):
        said = [one for piece in of for one in piece.said]
        choices.append(style.choice(index, "".join(p.text for p in of), of[-1].finish, said))
    return JSONResponse(style.whole(choices, usage([of[-1] for of in got.values()])))


async def _events(
    first: Piece, pieces: AsyncGenerator[Piece], style: Format, with_usage: bool
) -> AsyncIterator[str]:
    more: dict[str, Any] = {"usage": None} if with_usage else {}
    last: dict[int, Piece] = {}
    async with aclosing(pieces):
        try:
            async for piece in chain(first, pieces):
                last[piece.index] = piece
                if piece.text or piece.finish or piece.said:
                    part = style.part(piece.index, piece.text, piece.finish, piece.said)
                    yield _event(style.chunk([part], **more))
        except Exception as error:
            yield answer_as_event(error)  # the status has gone out; no [DONE] follows
            return
    if with_usage:
        yield _event(style.chunk([], usage=usage(list(last.values()))))
    yield "data: [DONE]\n\n"


async def chain(first: Piece, rest: AsyncIterator[Piece]) -> AsyncIterator[Piece]:
    yield first
    async for piece in rest:
        yield piece


async def read_body(request: Request) -> bytes:
    """Raises HTTPException: it is no JSON by its header, or too long."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip()
    if kind.lower() != "application/json":  # a form of some web page needs no permission to post
        raise HTTPException(415, f"Content-Type {kind or 'missing'}: want application/json")
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY:
            raise HTTPException(413, f"the body is too long: want at most {MAX_BODY} bytes")
    return bytes(body)


async def unless_gone(request: Request, answer: Awaitable[Answer]) -> Answer:
    """Await an answer, but work for nobody who has hung up. Raises HTTPException: they have."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            continue

    work, watch = asyncio.ensure_future(answer), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
        raise HTTPException(_GONE, "the client has hung up")
    finally:
        work.cancel()
        watch.cancel()


async def _answer_error(request: Request, error: Exception) -> Response:
    status, body, headers = _as_json(error)
    return JSONResponse(body, status, headers)


def _as_json(error: Exception) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Status, body, headers. A bug of ours goes to the log, not to the client."""
    message, kind = str(error), "invalid_request_error"
    match error:
        case QueueFullError():
            again = {"Retry-After": str(error.retry_after_s)}
            return 429, error_body(message, "requests", code="rate_limit_exceeded"), again
        case ClusterError() | WorkerLostError():
            again = {"Retry-After": str(_RETRY_S)}
            return 503, error_body(message, "server_error", code="unavailable"), again
        case FieldError():
            return 400, error_body(message, kind, param=error.field), {}
        case MoeRouterError():
            return 400, error_body(message, kind), {}
        case HTTPException():
            return error.status_code, error_body(str(error.detail), kind), dict(error.headers or {})
    _log.error("a request failed", exc_info=error)
    return 500, error_body("internal error; the server's log has it", "server_error"), {}


def answer_as_event(error: Exception) -> str:
    return _event(_as_json(error)[1])


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"
