"""The page: what it is served, and what a person sees of it in a real browser."""

import json
import re

import pytest

from moe_router.models import Sampling, generate
from moe_router.routing import Context
from moe_router.training.calibrate import Shifts
from tests.serving.browser import CHROMIUM, browser
from tests.serving.budget_work import routed_model
from tests.serving.web import MODEL, call, served
from tests.serving.work import TOKENIZER

ASKED = {"prompt": "The ", "max_tokens": 12, "temperature": 0.0}


def events(text):
    return [json.loads(part.removeprefix("data: ")) for part in text.split("\n\n") if part]


def test_a_traced_stream_is_the_completion_and_says_what_computed_each_token():
    with served(page=True) as (port, _):
        status, text, _ = call(port, "POST", "/demo/stream", ASKED)
        plain = json.loads(call(port, "POST", "/v1/completions", ASKED)[1])
    told = events(text)
    assert status == 200
    assert "".join(event["text"] for event in told) == plain["choices"][0]["text"]
    ids = [TOKENIZER.document_id, *TOKENIZER.encode("The ")]
    made = generate(MODEL, [ids], Sampling(max_new_tokens=12, temperature=0.0))[0]
    paths = [path for event in told for path in event["paths"]]
    assert len(paths) == len(ids) + len(made) - 1  # the last token is never read
    assert paths == chosen([*ids, *made[:-1]])
    assert all(event["executed"] == event["dense"] > 0 for event in told)


def chosen(ids):
    """Experts by token and block, of one pass over the whole text."""
    import torch

    seen = {}
    context = Context(observe=lambda layer, choice, plan: seen.update({layer: choice.target_TK}))
    offsets_B1 = torch.tensor([0, len(ids)], dtype=torch.int32)
    position_T = torch.arange(len(ids), dtype=torch.int32)
    with torch.no_grad():
        MODEL.eval()(torch.tensor(ids), position_T, offsets_B1, context=context)
    return [[seen[layer][t].tolist() for layer in sorted(seen)] for t in range(len(ids))]


@pytest.mark.parametrize(
    "path, body, status, message",
    [
        ("/demo/stream", {"prompt": ["a", "b"]}, 400, "2 prompts: the page shows one"),
        ("/demo/stream", {"prompt": "a", "zap": 1}, 400, "Unrecognized request argument"),
        ("/demo/kill", {"rank": "0"}, 400, "want {"),
        ("/demo/kill", {"rank": 7}, 400, "rank=7: want 0"),
    ],
)
def test_what_is_wrong_is_one_line(path, body, status, message):
    with served(page=True, chaos=True) as (port, _):
        got, text, _ = call(port, "POST", path, body)
    assert got == status and json.loads(text)["error"]["message"].find(message) >= 0


def test_without_chaos_nobody_kills_and_without_a_page_there_is_none():
    with served(page=True) as (port, _):
        assert call(port, "POST", "/demo/kill", {"rank": 0})[0] == 404
        status, text, headers = call(port, "GET", "/")
        assert status == 200 and "default-src 'none'" in headers["Content-Security-Policy"]
        assert "http://" not in text and "https://" not in text
        assert call(port, "GET", "/page/../demo.py")[0] == 404
    with served() as (port, _):
        assert call(port, "GET", "/")[0] == 404


def test_a_page_is_behind_the_token_too():
    with served(token="secret", page=True, chaos=True) as (port, _):
        for method, path in (("GET", "/"), ("GET", "/demo/facts"), ("POST", "/demo/kill")):
            body = {"rank": 0} if method == "POST" else None
            assert call(port, method, path, body)[0] == 401


needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")


@needs_chromium
def test_a_person_sees_the_text_grow_with_what_computed_it(tmp_path):
    with served(page=True) as (port, _), browser() as page:
        page.open(f"http://127.0.0.1:{port}/?prompt=The%20")
        page.until("document.querySelector('#about').textContent.startsWith('tiny: 3 blocks')")
        assert page.run("document.querySelector('#chaos').hidden")
        page.run("document.querySelector('#tokens').value = 12")
        page.run("document.querySelector('#temperature').value = 0")
        page.run("document.querySelector('#go').click()")
        page.until("!document.querySelector('#go').disabled && !!document.querySelector('.token')")
        plain = json.loads(call(port, "POST", "/v1/completions", ASKED)[1])
        shown = page.run("document.querySelector('#text').textContent")
        assert shown == "The " + plain["choices"][0]["text"]
        hues = page.run(
            "[...document.querySelectorAll('.token')].map(s => s.style.getPropertyValue('--hue'))"
        )
        assert len(set(hues)) > 1  # several experts
        assert page.run("document.querySelector('#budget-row').hidden")
        choices = page.run("document.querySelector('.bar').title")
        assert choices.startswith("expert 0: ") and choices.endswith("shard 0")
        page.run("document.querySelector('#text').focus()")
        page.key("End")
        page.key("ArrowLeft")
        assert "block 0: experts" in page.run("document.querySelector('#detail').textContent")
        page.picture(tmp_path / "page.png")
        page.open(f"http://127.0.0.1:{port}/", width=380, height=800)
        page.until("document.querySelector('#about').textContent.startsWith('tiny')")
        assert page.run("document.documentElement.scrollWidth <= 380")  # nothing is cut off
        assert page.problems == []


@needs_chromium
def test_a_slider_asks_for_a_compute_budget(tmp_path):
    model, config = routed_model("skip", moe=True)
    server = served(page=True, model=model, shifts=Shifts(model, config))
    with server as (port, _), browser() as page:
        page.open(f"http://127.0.0.1:{port}/")
        page.until("document.querySelector('#about').textContent.includes('skip blocks')")
        shares = [executed_at(page, budget) for budget in (None, 0, 1)]
        page.picture(tmp_path / "budget.png")
        assert page.problems == []
    trained, least, most = shares
    assert least < trained < most and most >= 100


def executed_at(page, budget):
    """The share of the dense model's FLOPs that the page shows; None leaves the slider alone."""
    assert not page.run("document.querySelector('#budget-row').hidden")
    if budget is not None:
        page.run(f"document.querySelector('#budget').value = {budget}")
        page.run("document.querySelector('#budget').dispatchEvent(new Event('input'))")
        assert page.run("document.querySelector('#budget-told').textContent") == str(budget)
    page.run("document.querySelector('#tokens').value = 12")
    page.run("document.querySelector('#go').click()")
    page.until("!document.querySelector('#go').disabled && !!document.querySelector('.token')")
    assert "tokens, " in page.run("document.querySelector('#speed').textContent")
    told = page.run("document.querySelector('#saved').textContent")
    return int(re.fullmatch(r"Executed (\d+)% of the dense model's matrix FLOPs\.", told)[1])


@needs_chromium
def test_an_error_is_told_and_the_page_goes_on():
    with served(page=True) as (port, _), browser() as page:
        page.open(f"http://127.0.0.1:{port}/")
        page.until("document.querySelector('#about').textContent.startsWith('tiny')")
        page.run("document.querySelector('#tokens').removeAttribute('max')")
        page.run("document.querySelector('#tokens').value = 100000000")
        page.run("document.querySelector('#go').click()")
        said = page.until("document.querySelector('#status').textContent")
        assert "prompt + max_tokens" in said and "want at most" in said
        assert not page.run("document.querySelector('#go').disabled")
