"""What the routes take and give, as an OpenAPI document: /openapi.json."""

from typing import Any

from pydantic.json_schema import models_json_schema

from moe_router.serving.openai_chat import ChatRequest
from moe_router.serving.openai_types import CompletionRequest

Schema = dict[str, Any]
_TEXT: Schema = {"type": "string"}
_WHOLE: Schema = {"type": "integer", "minimum": 0}
_REFUSALS = {
    400: "what is wrong with the request, in one line",
    401: "no token, or a wrong one",
    403: "a server without a token answers its own machine alone",
    404: "no such model",
    413: "the body is too long",
    415: "the body is not application/json",
    429: "too many wait; Retry-After says when to ask again",
    503: "the ranks are made anew; Retry-After says when to ask again",
}
_GUARDED = (401, 403)


def document(model: str) -> Schema:
    """OpenAPI 3.1 of a server whose clients know its model by this name."""
    requests = (CompletionRequest, ChatRequest)
    kinds = [(kind, "validation") for kind in requests]
    _, schemas = models_json_schema(kinds, ref_template=_ref("{model}"))  # type: ignore[arg-type]
    components = schemas["$defs"] | _answers()
    for kind in requests:
        components[kind.__name__]["properties"]["model"] = {"enum": [model, None]}
    health = {"200": _json("Health", "it answers"), "503": _json("Health", "it does not, and why")}
    metrics = {"description": "Prometheus", "content": {"text/plain": {"schema": _TEXT}}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "moe_router", "version": "v1"},
        "paths": {
            "/health": {"get": {"operationId": "health", "security": [], "responses": health}},
            "/metrics": _get("metrics", metrics, 503),
            "/v1/models": _get("models", _json("Models", "the served one")),
            "/v1/completions": _post("completions", "CompletionRequest", "Completion"),
            "/v1/chat/completions": _post("chat", "ChatRequest", "ChatCompletion"),
        },
        "components": {
            "schemas": components,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"token": []}, {}],
    }


def _get(name: str, good: Schema, *refusals: int) -> Schema:
    return {"get": {"operationId": name, "responses": _responses(good, *_GUARDED, *refusals)}}


def _post(name: str, asked: str, answer: str) -> Schema:
    good = _json(answer, "whole, or streamed as events of `data:` lines")
    good["content"]["text/event-stream"] = {}
    body = {"required": True, "content": {"application/json": {"schema": {"$ref": _ref(asked)}}}}
    operation = {"operationId": name, "requestBody": body}
    return {"post": operation | {"responses": _responses(good, *_REFUSALS)}}


def _responses(good: Schema, *refusals: int) -> Schema:
    return {"200": good} | {str(status): _json("Error", _REFUSALS[status]) for status in refusals}


def _json(name: str, description: str) -> Schema:
    content = {"application/json": {"schema": {"$ref": _ref(name)}}}
    return {"description": description, "content": content}


def _ref(name: str) -> str:
    return f"#/components/schemas/{name}"


def _answers() -> Schema:
    usage = _object(
        prompt_tokens=_WHOLE, completion_tokens=_WHOLE, total_tokens=_WHOLE,
        prompt_tokens_details=_object(cached_tokens=_WHOLE),
    )  # fmt: skip
    common = {"id": _TEXT, "created": _WHOLE, "model": _TEXT, "usage": usage}
    ending: Schema = {"index": _WHOLE, "finish_reason": {"enum": ["stop", "length"]}}
    ending["logprobs"] = {"type": ["object", "null"]}
    message = _object(role={"const": "assistant"}, content=_TEXT)
    model = _object(id=_TEXT, object={"const": "model"}, created=_WHOLE, owned_by=_TEXT)
    unknown: Schema = {"type": ["string", "null"]}
    error = _object(message=_TEXT, type=_TEXT, param=unknown, code=unknown)
    health = _object(status={"enum": ["ok", "unavailable"]}, model=_TEXT)
    health["properties"]["reason"] = _TEXT
    return {
        "Completion": _object(
            **common,
            object={"const": "text_completion"},
            choices=_list(_object(text=_TEXT, **ending)),
        ),
        "ChatCompletion": _object(
            **common,
            object={"const": "chat.completion"},
            choices=_list(_object(message=message, **ending)),
        ),
        "Models": _object(object={"const": "list"}, data=_list(model)),
        "Error": _object(error=error),
        "Health": health,
    }


def _object(**properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "required": list(properties)}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}
