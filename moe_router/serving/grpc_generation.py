"""The gRPC front of a served model: `service Generation` over whoever makes text."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from typing import Any

from moe_router.config import require
from moe_router.serving import router_pb2 as pb
from moe_router.serving.grpc_server import Adder
from moe_router.serving.requests import STOP_CHARACTERS, STOPS, Ask, Piece
from moe_router.serving.router_pb2_grpc import (
    GenerationServicer,
    add_GenerationServicer_to_server,
)
from moe_router.serving.service import Service


def generation_adder(service: Service) -> Adder:
    """For `serve_grpc`: the service `Generation` over `service`."""
    add = partial(add_GenerationServicer_to_server, GenerationFront(service))
    return Adder("moe_router.v1.Generation", add)


class GenerationFront(GenerationServicer):
    """The methods of `service Generation`. Errors become status codes in `grpc_server`."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def Generate(
        self, request: pb.GenerateRequest, context: Any
    ) -> AsyncGenerator[pb.GenerateEvent]:
        served = self._service.model
        require(request.model in ("", served), "model", request.model, f"{served}, or nothing")
        async with aclosing(self._service.stream(ask_of(request))) as pieces:
            async for piece in pieces:
                yield _event(piece)

    async def Health(self, request: pb.HealthRequest, context: Any) -> pb.HealthReply:
        health = await self._service.health()
        return pb.HealthReply(ok=health.ok, reason=health.reason, model=health.model)


def ask_of(request: pb.GenerateRequest) -> Ask:
    """Raises ConfigError: there is no prompt, or more to stop at than OpenAI's HTTP takes."""
    kind = request.WhichOneof("prompt")
    require(kind is not None, "prompt", "nothing", "text or tokens")
    few = len(request.stop) <= STOPS and all(len(text) <= STOP_CHARACTERS for text in request.stop)
    want = f"up to {STOPS} texts, each of 1..{STOP_CHARACTERS} characters"
    require(few, "stop", f"{len(request.stop)} texts", want)
    prompt = request.text if kind == "text" else tuple(request.tokens.ids)
    optional = ("max_tokens", "temperature", "top_k", "top_p", "seed", "compute_budget")
    given = {key: getattr(request, key) for key in optional if request.HasField(key)}
    return Ask(prompts=(prompt,), stop=tuple(request.stop), **given)


def _event(piece: Piece) -> pb.GenerateEvent:
    event = pb.GenerateEvent(text=piece.text, tokens=piece.tokens, finish_reason=piece.finish)
    if piece.finish:
        event.prompt_tokens, event.completion_tokens = piece.prompt_tokens, piece.made
    return event
