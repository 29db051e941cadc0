"""The routes in OpenAI's format, over a real server on loopback and a real engine behind it."""

import json

import pytest

from moe_router.models import Sampling, generate
from moe_router.serving.openai import MAX_BODY
from tests.serving.web import MODEL, STOP, call, complete, served
from tests.serving.work import TOKENIZER


@pytest.fixture(scope="module")
def port():
    with served(slots=8) as (found, _):
        yield found


def stream(port, prompt="The ", **asked):
    """The data of each event."""
    body = {"prompt": prompt, "stream": True, **asked}
    status, text, headers = call(port, "POST", "/v1/completions", body)
    assert status == 200 and headers["content-type"].startswith("text/event-stream")
    *events, end = text.split("\n\n")
    assert end == "" and all(event.startswith("data: ") for event in events)
    return [event.removeprefix("data: ") for event in events]


def wanted(prompt, **sampling):
    ids = [STOP, *prompt.encode()] if isinstance(prompt, str) else prompt
    return TOKENIZER.decode(generate(MODEL, [ids], Sampling(**sampling), stop_id=STOP)[0])


def test_a_completion_is_the_text_of_generate(port):
    status, body = complete(port, model="tiny", max_tokens=9, temperature=1, seed=3)
    assert status == 200
    (choice,) = body["choices"]
    assert choice == {
        "text": wanted("The ", max_new_tokens=9, temperature=1.0, seed=3),
        "index": 0,
        "logprobs": None,
        "finish_reason": "length",
    }
    counts = {"prompt_tokens": 5, "completion_tokens": 9, "total_tokens": 14}
    assert body["usage"] == counts | {"prompt_tokens_details": {"cached_tokens": 0}}
    assert (body["object"], body["model"]) == ("text_completion", "tiny")
    assert body["id"].startswith("cmpl-")


def test_usage_says_how_much_of_a_prompt_was_remembered(port):
    prompt, whole = "The same words. " * 10, 128
    for known in (0, whole):
        _, body = complete(port, prompt=prompt, max_tokens=2, temperature=0)
        assert body["choices"][0]["text"] == wanted(prompt, max_new_tokens=2, temperature=0.0)
        assert body["usage"]["prompt_tokens"] == 161
        assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": known}
    *_, last, _ = stream(port, prompt, max_tokens=2, stream_options={"include_usage": True})
    assert json.loads(last)["usage"]["prompt_tokens_details"] == {"cached_tokens": whole}
    metrics = call(port, "GET", "/metrics")[1]
    assert f"prompt_tokens_known_total {2 * whole}" in metrics


def test_a_stream_is_the_same_text_in_pieces(port):
    asked = {"max_tokens": 9, "temperature": 1, "seed": 3}
    *events, done = stream(port, **asked, stream_options={"include_usage": True})
    assert done == "[DONE]"
    *chunks, last = map(json.loads, events)
    texts = [chunk["choices"][0]["text"] for chunk in chunks]
    assert "".join(texts) == complete(port, **asked)[1]["choices"][0]["text"] and len(texts) > 2
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (
        len(chunks) - 1
    ) + ["length"]
    assert all(chunk["usage"] is None for chunk in chunks) and last["choices"] == []
    assert last["usage"]["completion_tokens"] == 9
    assert len({chunk["id"] for chunk in [*chunks, last]}) == 1
    assert "usage" not in json.loads(stream(port, **asked)[0])


@pytest.mark.parametrize(
    ("prompt", "each"),
    [
        (["The ", "a"], ["The ", "a"]),
        ([256, 84], [[256, 84]]),
        ([[256, 84], [97]], [[256, 84], [97]]),
        ("", [[256]]),
    ],
)
def test_every_form_of_a_prompt(port, prompt, each):
    _, body = complete(port, prompt, seed=1, temperature=0.9)
    texts = [wanted(one, max_new_tokens=6, temperature=0.9, seed=1) for one in each]
    assert [choice["text"] for choice in body["choices"]] == texts
    assert [choice["index"] for choice in body["choices"]] == list(range(len(each)))


def test_a_stop_string_is_obeyed(port):
    whole = wanted("The ", max_new_tokens=30, temperature=1.0, seed=1)
    stop = whole[4:6]
    asked = {"max_tokens": 30, "temperature": 1, "seed": 1, "stop": stop}
    (choice,) = complete(port, **asked)[1]["choices"]
    assert (choice["text"], choice["finish_reason"]) == (whole[: whole.index(stop)], "stop")
    assert complete(port, **{**asked, "stop": ["nowhere", stop]})[1]["choices"] == [choice]


@pytest.mark.parametrize(
    ("body", "status", "message", "param"),
    [
        (
            {"prompt": "a", "tempo": 1},
            400,
            "Unrecognized request argument supplied: tempo",
            "tempo",
        ),
        ({"prompt": 3}, 400, "prompt: want a text, a list of texts, a list of token ids", "prompt"),
        ({"prompt": []}, 400, "prompt=nothing: want at least one prompt", None),
        ({}, 400, "prompt: want a text", "prompt"),
        ({"prompt": "a", "n": 2}, 400, "n=2: Input should be 1", "n"),
        (
            {"prompt": "a", "temperature": 3},
            400,
            "temperature=3: Input should be less",
            "temperature",
        ),
        ({"prompt": "a", "max_tokens": "5"}, 400, 'max_tokens="5": Input should be a valid', None),
        ({"prompt": "a", "stop": ["a"] * 5}, 400, "stop: want a text or up to 4 texts", "stop"),
        ({"prompt": [1, 999]}, 400, "prompt 0 holds token 999: want 0..256", None),
        (
            {"prompt": "a", "model": "gpt"},
            404,
            "The model `gpt` does not exist: want `tiny`",
            "model",
        ),
        ({"prompt": "a", "max_tokens": 10**7}, 400, "prompt + max_tokens=10000002: want", None),
        (b"[1", 400, "the body is no JSON object", None),
        (b'{"prompt": "a", "temperature": NaN}', 400, "temperature=NaN", "temperature"),
        (b" " * (MAX_BODY + 1), 413, "the body is too long: want at most", None),
    ],
)
def test_errors_have_the_format_of_openai(port, body, status, message, param):
    got, text, _ = call(port, "POST", "/v1/completions", body)
    error = json.loads(text)["error"]
    assert got == status and error["message"].startswith(message)
    assert error["type"] == "invalid_request_error" and error.keys() >= {"param", "code"}
    assert param is None or error["param"] == param


def test_an_error_of_a_streamed_request_has_its_own_status(port):
    assert complete(port, [1, 999], stream=True)[0] == 400


def test_other_routes(port):
    assert json.loads(call(port, "GET", "/health")[1]) == {"status": "ok", "model": "tiny"}
    (model,) = json.loads(call(port, "GET", "/v1/models")[1])["data"]
    assert (model["id"], model["object"]) == ("tiny", "model")
    status, text, _ = call(port, "GET", "/v1/nowhere")
    assert status == 404 and json.loads(text)["error"]["message"] == "Not Found"
    assert call(port, "GET", "/v1/completions")[0] == 405
