"""Prompts that begin like earlier texts: the same answers, and less to read."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_router.config import RoutingConfig
from moe_router.models import Sampling, generate, kv_cache
from moe_router.serving.decoder import Decoder
from moe_router.serving.requests import Request, Work
from tests.gloo import run_ranks
from tests.serving.work import TOKENIZER, byte_model, drive, request

PAGE = kv_cache.PAGE
SYSTEM = "You answer in the words of the documentation, briefly, and name the function. " * 2


def asks():
    questions = ["What is a tuple?", "What is a list?", SYSTEM, "", "What is a tuple? And a set?"]
    how = [{}, {"temperature": 1.1, "seed": 3}, {"temperature": 0.0}, {"seed": 4}, {"seed": 3}]
    return [
        request(i, SYSTEM + text, max_new_tokens=9 + i, **ways)
        for i, (text, ways) in enumerate(zip(questions, how, strict=True))
    ]


def wanted(model, requests):
    return {r.id: generate(model, [r.prompt], r.sampling, stop_id=None)[0] for r in requests}


def fed(model):
    """How many tokens each of its passes takes."""
    counts = []
    model.register_forward_pre_hook(lambda _, args: counts.append(len(args[0])))
    return counts


@settings(max_examples=8, deadline=None)
@given(
    st.lists(st.integers(0, 25), min_size=5, max_size=5),
    st.integers(0, 2),
    st.sampled_from([9, 100, 1000]),
    st.sampled_from([PAGE, 3 * PAGE, 100 * PAGE]),
)
def test_answers_do_not_depend_on_what_is_remembered(arrivals, ahead, read, remember):
    model, admitted = byte_model(), {}
    for arrival, one in zip(arrivals, asks(), strict=True):
        admitted.setdefault(arrival, []).append(one)
    decoder = Decoder(model, None, ahead=ahead, remember=remember)
    assert drive(decoder, admitted, 140, read) == wanted(model, asks())
    assert 0 < decoder._cache.pool.used <= 3 * remember // PAGE  # pages of three layers


def test_a_beginning_is_read_once_and_its_pages_are_known():
    model = byte_model()
    counts, decoder, known = fed(model), Decoder(model, None, remember=10_000), {}
    for one in asks():
        for event in decoder.step(Work((one,))):
            known[event.id] = event.known or known.get(event.id, 0)
    whole = (len(SYSTEM) - 1) // PAGE * PAGE
    assert known == {0: 0, 1: whole, 2: whole, 3: whole, 4: whole}
    last = len(asks()[4].prompt)
    assert counts[-1] == last - whole + 4  # and a token of each of the others


def test_a_conversation_goes_on_where_it_ended():
    """The answer too is a beginning of the next prompt."""
    model = byte_model()
    first = request(0, "x" * (PAGE - 1), max_new_tokens=PAGE + 5)
    decoder = Decoder(model, None, remember=1000)
    answer = drive(decoder, {0: [first]}, PAGE + 8)[0]
    then = Request(1, (*first.prompt, *answer, 7), Sampling(max_new_tokens=3))
    (event,) = decoder.step(Work((then,)))
    assert event.known == 2 * PAGE
    assert [event.token] == generate(model, [then.prompt], then.sampling)[0][:1]


@pytest.mark.parametrize("more", [{"trace": True}, {"logprobs": 2, "echo": True}])
def test_who_asks_about_the_prompt_has_it_read(more):
    model = byte_model()
    decoder = Decoder(model, None, remember=1000)
    for number in (0, 1):
        one = Request(number, tuple(SYSTEM.encode()), Sampling(max_new_tokens=1), **more)
        (event,) = decoder.step(Work((one,)))
        assert event.known == 0
        told = event.trace.paths if "trace" in more else event.scores[:-1]
        assert len(told) == len(SYSTEM)


def test_layers_that_tokens_pass_by_remember_nothing():
    decoder = Decoder(
        byte_model(routing=RoutingConfig(kind="halt", threshold=0.9)), None, remember=1000
    )
    drive(decoder, {0: asks()}, 30)
    assert decoder._cache.pool.used == 0


def of_rank(rank, ranks):
    decoder = Decoder(byte_model(), TOKENIZER.document_id, remember=1000)
    mine = asks()[rank::ranks]
    return drive(decoder, {3 * n + rank: [one] for n, one in enumerate(mine)}, 60, 50)


def test_each_rank_remembers_its_own():
    made = {}
    for part in run_ranks(2, of_rank):
        made |= part
    model = byte_model()
    stop = TOKENIZER.document_id
    for one in asks():
        assert made[one.id] == generate(model, [one.prompt], one.sampling, stop_id=stop)[0]


@pytest.mark.gpu
def test_graphs_of_steps_read_remembered_pages():
    model = byte_model(dim=64).cuda()
    decoder = Decoder(model, None, remember=1000)
    made = drive(decoder, {4 * n: [one] for n, one in enumerate(asks())}, 80)
    assert made == wanted(model, asks())
