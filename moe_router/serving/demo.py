"""The page: type a prompt, see which experts compute each token, and kill a shard meanwhile.

Static files of this package, without a build step and without anything from elsewhere.
"""

import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import asdict, replace
from importlib.resources import files

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response, StreamingResponse

from moe_router.serving.openai import answer_as_event, chain, read_body, unless_gone
from moe_router.serving.openai_types import CompletionRequest, FieldError
from moe_router.serving.requests import Piece
from moe_router.serving.service import Watched

_FILES = {"": "text/html", "page.css": "text/css", "page.js": "text/javascript"}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


def add_page(app: FastAPI, service: Watched, *, chaos: bool) -> None:
    """Add the page to the routes of `make_app`; its guard stands before them too.

    Args:
        chaos: whoever sees the page may kill shards.
    """
    front = _Page(service, chaos)
    for name in _FILES:
        app.add_api_route(f"/{name}", front.file, methods=["GET"])
    app.add_api_route("/demo/facts", front.facts, methods=["GET"])
    app.add_api_route("/demo/stream", front.stream, methods=["POST"])
    if chaos:
        app.add_api_route("/demo/kill", front.kill, methods=["POST"])


class _Page:
    def __init__(self, service: Watched, chaos: bool) -> None:
        self._service, self._chaos = service, chaos

    async def file(self, request: Request) -> Response:
        name = request.url.path.removeprefix("/")
        text = (files(__package__) / "page" / (name or "index.html")).read_text("utf-8")
        return Response(text, media_type=_FILES[name], headers=_HEADERS)

    async def facts(self) -> Response:
        return JSONResponse(asdict(await self._service.facts()) | {"chaos": self._chaos})

    async def stream(self, request: Request) -> Response:
        """A completion, as /v1/completions takes it; events say what computed each token."""
        ask = replace(CompletionRequest.read(await read_body(request)).ask, trace=True)
        if len(ask.prompts) != 1:
            raise FieldError("prompt", f"{len(ask.prompts)} prompts: the page shows one")
        pieces = self._service.stream(ask)
        first = await unless_gone(request, anext(pieces))
        return StreamingResponse(_events(first, pieces), media_type="text/event-stream")

    async def kill(self, request: Request) -> Response:
        try:
            rank = json.loads(await read_body(request))["rank"]
        except (ValueError, KeyError, TypeError):
            rank = None
        if type(rank) is not int:
            raise HTTPException(400, 'want {"rank": NUMBER}')
        await self._service.kill(rank)
        return JSONResponse({"killed": rank})


async def _events(first: Piece, pieces: AsyncGenerator[Piece]) -> AsyncIterator[str]:
    async with aclosing(pieces):
        try:
            async for piece in chain(first, pieces):
                yield f"data: {json.dumps(_told(piece), ensure_ascii=False)}\n\n"
        except Exception as error:
            yield answer_as_event(error)


def _told(piece: Piece) -> dict[str, object]:
    told: dict[str, object] = {"text": piece.text, "made": piece.made, "finish": piece.finish}
    if piece.trace is not None:
        told |= asdict(piece.trace)
    return told
