"""Log-probabilities of prompts and answers, as evaluation harnesses ask for them."""

import openai
import pytest
import torch

from moe_router.models import Sampling
from moe_router.serving.decoder import Decoder
from moe_router.serving.requests import Request, Work
from tests.serving.web import MODEL, STOP, complete, served
from tests.serving.work import TOKENIZER


@pytest.fixture(scope="module")
def port():
    with served(slots=8, prefill=4) as (found, _):  # longer prompts are read in parts
        yield found


def logprobs(ids):
    """(T - 1, V): of what may follow each token, by one pass over the whole text."""
    offsets_B1 = torch.tensor([0, len(ids)], dtype=torch.int32)
    position_T = torch.arange(len(ids), dtype=torch.int32)
    with torch.no_grad():
        logits_TV = MODEL.eval()(torch.tensor(ids), position_T, offsets_B1).logits_TV
    return logits_TV.log_softmax(-1)


@pytest.mark.parametrize("prompt", ["The end", [STOP, 84, 104, 101]])
@pytest.mark.parametrize("max_tokens", [0, 1, 5])
def test_an_echoed_prompt_is_scored_token_by_token(port, prompt, max_tokens):
    asked = {"max_tokens": max_tokens, "echo": True, "logprobs": 2, "temperature": 0}
    status, body = complete(port, prompt, **asked)
    assert status == 200
    (choice,) = body["choices"]
    told = choice["logprobs"]
    named = isinstance(prompt, str)
    ids = [STOP, *TOKENIZER.encode(prompt)] if named else prompt
    made = body["usage"]["completion_tokens"]
    assert made == max_tokens
    for _ in range(made):
        ids = [*ids, int(logprobs(ids)[-1].argmax())]
    table_TV = logprobs(ids)
    wanted = [None, *(float(table_TV[t, ids[t + 1]]) for t in range(len(ids) - 1))]
    if named:  # the separator that was put before a text is not the client's
        wanted = wanted[1:]
    assert told["token_logprobs"] == pytest.approx(wanted, abs=1e-4)
    assert "".join(told["tokens"]) == choice["text"] or "\ufffd" in choice["text"]
    assert told["text_offset"][0] == 0 and len(told["text_offset"]) == len(wanted)
    for one, best in zip(told["token_logprobs"], told["top_logprobs"], strict=True):
        assert best is None if one is None else max(best.values()) >= one - 1e-6
    answered = told["token_logprobs"][len(wanted) - made :]
    assert answered == pytest.approx(wanted[len(wanted) - made :], abs=1e-4)


def test_the_score_of_a_continuation_is_what_a_harness_cuts_out(port):
    """lm-evaluation-harness sends context and continuation as ids, echoed, with one token more."""
    context, continuation = [STOP, 65, 66], [67, 68]
    asked = {"max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0}
    (choice,) = complete(port, context + continuation, **asked)[1]["choices"]
    cut = choice["logprobs"]["token_logprobs"][len(context) : -1]
    table_TV = logprobs(context + continuation)
    wanted = [float(table_TV[2, 67]), float(table_TV[3, 68])]
    assert cut == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("echo", [True, False])
def test_a_stop_token_is_scored_after_an_echo_alone(echo):
    """Else a harness would cut off the score of the last token of the continuation."""
    ids = (84, 104, 101)
    likeliest = int(logprobs(ids)[-1].argmax())
    asked = Request(0, ids, Sampling(max_new_tokens=1, temperature=0.0), logprobs=1, echo=echo)
    (event,) = Decoder(MODEL, stop_id=likeliest).step(Work((asked,)))
    assert (event.token, event.finish) == (None, "stop")
    assert [one.token for one in event.scores] == ([*ids, likeliest] if echo else [])


def test_the_official_client_works_unchanged(port):
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["tiny"]
    asked = {"model": "tiny", "prompt": "The ", "max_tokens": 8, "seed": 3, "temperature": 1}
    whole = client.completions.create(**asked, logprobs=1)
    assert len(whole.choices[0].logprobs.token_logprobs) == 8
    parts = list(client.completions.create(**asked, stream=True, logprobs=1))
    assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text
    streamed = [one for part in parts for one in part.choices[0].logprobs.token_logprobs]
    assert streamed == pytest.approx(whole.choices[0].logprobs.token_logprobs, abs=1e-5)
    offsets = [one for part in parts for one in part.choices[0].logprobs.text_offset]
    assert offsets == whole.choices[0].logprobs.text_offset
    with pytest.raises(openai.BadRequestError, match="temperature=9"):
        client.completions.create(**asked | {"temperature": 9})
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.completions.create(**asked | {"model": "gpt"})
