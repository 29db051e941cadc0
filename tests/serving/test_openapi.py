"""The OpenAPI document is true: requests made from it, sound and unsound, get what it says, and
never a 500."""

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import load_all_checks, not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from moe_router.serving.openai import MAX_BODY
from moe_router.serving.openapi import document
from tests.serving.test_chat import tokenizer_in
from tests.serving.web import call, complete, served
from tests.serving.work import byte_model

load_all_checks()
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
]
POSTS = ["/v1/completions", "/v1/chat/completions"]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Of a model that chats; tokens are few, so that no answer takes long."""
    tokenizer = tokenizer_in(tmp_path_factory.mktemp("tokenizer"))
    with served(model=byte_model(vocab=tokenizer.vocab), tokenizer=tokenizer, tokens=90) as made:
        port, _ = made
        schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{port}/openapi.json")
        yield schema, port


def ask(server, method, path, mode, examples=15):
    """Statuses of what was made from the document."""
    schema, port = server
    seen = set()

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate],  # what fails is shown as it is; smaller is not worth the time
        suppress_health_check=list(HealthCheck),
    )
    @given(schema[path][method].as_strategy(generation_mode=mode))
    def send(case):
        answer = case.call(base_url=f"http://127.0.0.1:{port}", timeout=30)
        case.validate_response(answer, checks=CHECKS)
        seen.add(answer.status_code)

    send()
    return seen


@pytest.mark.parametrize("path", POSTS)
def test_sound_requests_are_answered_or_refused_as_documented(server, path):
    assert 200 in ask(server, "POST", path, GenerationMode.POSITIVE)


@pytest.mark.parametrize("path", POSTS)
def test_unsound_requests_are_refused(server, path):
    assert 200 not in ask(server, "POST", path, GenerationMode.NEGATIVE)


@pytest.mark.slow
@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize("mode", list(GenerationMode))
def test_many_requests_never_find_a_500(server, path, mode):
    assert ask(server, "POST", path, mode, examples=400)


WICKED = [
    ({"top_k": 2**63}, 400),
    ({"max_tokens": 10**30}, 400),
    ({"prompt": [10**30]}, 400),
    ({"prompt": []}, 400),
    ({"prompt": ["a"] * 300}, 400),
    ({"compute_budget": 0.5}, 400),
    ({"seed": -(10**30)}, 200),
    ({"temperature": 1e-45}, 200),
    ({"temperature": 2, "top_p": 5e-324}, 200),
    ({"prompt": "\0", "stop": "\0"}, 200),
]


@pytest.mark.parametrize(("more", "status"), WICKED)
def test_numbers_out_of_the_ordinary_leave_the_server_well(server, more, status):
    _, port = server
    assert complete(port, **{"max_tokens": 3} | more)[0] == status
    assert call(port, "GET", "/health")[0] == 200


BROKEN = [
    b"",
    b"null",
    b"[" * 100_000,
    b'{"prompt":"\\udade"}',
    b'{"prompt":"\xff"}',
    b'{"prompt":"a","seed":1' + b"0" * 5000,
]


@pytest.mark.parametrize("path", POSTS)
def test_bodies_that_are_no_request_are_refused(server, path):
    _, port = server
    assert {call(port, "POST", path, body)[0] for body in BROKEN} == {400}
    assert call(port, "POST", path, b" " * (MAX_BODY + 1))[0] == 413


@pytest.mark.parametrize("path", ["/health", "/metrics", "/v1/models"])
def test_what_can_be_read_is_as_documented(server, path):
    assert ask(server, "GET", path, GenerationMode.POSITIVE, examples=1) == {200}


def test_the_document_names_every_route_and_is_behind_the_token():
    paths = document("tiny")["paths"]
    with served(token="secret") as (port, _):
        key = {"Authorization": "Bearer secret"}
        assert call(port, "GET", "/openapi.json")[0] == 401
        assert call(port, "GET", "/openapi.json", headers=key)[0] == 200
        for path, methods in paths.items():
            for method in methods:
                status, _, _ = call(port, method.upper(), path, None, key)
                assert status in (200, 415)
    with served() as (port, _):
        assert complete(port, model="other")[0] == 404
