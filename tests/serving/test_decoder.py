"""One rank's batch: whatever joins and leaves it, a request gets the text of `generate`."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_router.config import RoutingConfig
from moe_router.errors import NotCausalError
from moe_router.models import Sampling, generate, steps
from moe_router.serving.decoder import Decoder
from moe_router.serving.requests import Event, Request, Work
from tests.gloo import run_ranks
from tests.serving.work import REQUESTS, TOKENIZER, byte_model, drive, request, two_ranks

HALT = RoutingConfig(kind="halt", threshold=0.9)
SKIP = RoutingConfig(kind="skip", keep=0.5)
LEAP = RoutingConfig(kind="leap", start=0.0, every=1, first=1)


@pytest.fixture(autouse=True, scope="module")
def buckets_of_a_gpu():
    """With cells of no sequence, which a CPU does without elsewhere."""
    sizes, steps.bucket_of = steps.bucket_of, lambda n, graphs: 1 << (n - 1).bit_length()
    yield
    steps.bucket_of = sizes


def wanted(model, requests=REQUESTS, stop_id=TOKENIZER.document_id):
    return {r.id: generate(model, [r.prompt], r.sampling, stop_id=stop_id)[0] for r in requests}


@settings(max_examples=10, deadline=None)
@given(
    st.lists(st.integers(0, 12), min_size=5, max_size=5),
    st.integers(0, 2),
    st.sampled_from([1, 2, 5, 100]),
)
def test_a_text_does_not_depend_on_when_its_neighbours_come(arrivals, ahead, read):
    model = byte_model()
    admitted = {}
    for arrival, one in zip(arrivals, REQUESTS, strict=True):
        admitted.setdefault(arrival, []).append(one)
    decoder = Decoder(model, TOKENIZER.document_id, ahead=ahead)
    assert drive(decoder, admitted, 100, read) == wanted(model)
    assert decoder._cache.pool.used == 0


@pytest.mark.parametrize("ahead", [0, 1])
def test_texts_outlast_a_stretch_of_steps_and_outgrow_its_tables(ahead, monkeypatch):
    monkeypatch.setattr(steps, "STRETCH", 3)
    monkeypatch.setattr(steps, "_ROWS", 2)
    monkeypatch.setattr(steps, "_COLUMNS", 1)
    model = byte_model()
    long = [request(i, text, max_new_tokens=70 + i, seed=i) for i, text in enumerate("abcde")]
    decoder = Decoder(model, None, ahead=ahead)
    assert drive(decoder, {0: long[:1], 9: long[1:]}, 140) == wanted(model, long, None)


def test_a_text_that_ends_with_its_stretch_costs_no_pass_of_nobody(monkeypatch):
    monkeypatch.setattr(steps, "STRETCH", 3)
    model, tokens = byte_model(), []
    model.register_forward_pre_hook(lambda _, args: tokens.append(len(args[0])))
    decoder = Decoder(model, None, ahead=1)
    drive(decoder, {0: [request(0, "ab", max_new_tokens=4)]}, 8)
    assert tokens == [2, 1, 1, 1]


@pytest.mark.parametrize("routing", [HALT, SKIP], ids=["halt", "skip"])
def test_prompts_are_read_in_parts_where_tokens_skip_blocks(routing):
    model = byte_model(routing=routing)
    made = drive(Decoder(model, None), {0: REQUESTS[:3], 2: REQUESTS[3:]}, 60, read=4)
    assert made == wanted(model, REQUESTS, None)


def test_a_prompt_read_in_parts_is_traced_whole():
    model = byte_model()
    one = Request(0, tuple(b"some words"), Sampling(max_new_tokens=1, temperature=0), trace=True)
    traces = []
    for read in (3, 100):
        decoder, events = Decoder(model, None), []
        for n in range(4):
            events += decoder.step(Work((one,) if n == 0 else (), read=read))
        (event,) = events
        traces.append(event.trace)
    assert len(traces[0].paths) == 10 and traces[0].paths == traces[1].paths
    assert (traces[0].executed, traces[0].dense) == (traces[1].executed, traces[1].dense)


def test_running_sequences_do_not_wait_for_a_long_prompt():
    model = byte_model()
    short, long = request(0, "ab", max_new_tokens=9), request(1, "x" * 20, max_new_tokens=2)
    decoder = Decoder(model, None)
    told = [
        [event.id for event in decoder.step(Work(admit, read=5))]
        for admit in ((short,), (), (long,), (), (), (), ())
    ]
    assert told == [[0], [0], [0], [0], [0], [0, 1], [0, 1]]


@pytest.mark.parametrize("routing", [SKIP, LEAP], ids=["skip", "leap"])
def test_tokens_skip_and_leap_in_steps_of_fixed_shapes(routing, monkeypatch):
    monkeypatch.setattr(steps, "STRETCH", 3)
    model = byte_model(routing=routing, experts=0)
    requests = [request(i, text, max_new_tokens=9 + i, seed=i) for i, text in enumerate("abcde")]
    decoder = Decoder(model, None, ahead=1)
    text = wanted(model, requests, None)
    assert drive(decoder, {0: requests[:2], 4: requests[2:]}, 60) == text
    assert decoder._steps is not None
    decoder = Decoder(model, None, ahead=1)
    drive(decoder, {0: requests[:1]}, 8)
    held = [layer.lengths[0] for layer in decoder._cache.layers]
    assert min(held) < max(held)  # a block that was not taken holds less


def test_a_step_ahead_is_told_of_one_call_later():
    model = byte_model()
    one = request(0, "ab", max_new_tokens=4)
    (text,) = wanted(model, [one], None).values()
    decoder = Decoder(model, None, ahead=1)
    calls = [decoder.step(Work((one,) if n == 0 else ())) for n in range(6)]
    told = [[event.token for event in events] for events in calls]
    assert told == [[text[0]], [], [text[1]], [text[2]], [text[3]], []]


def test_steps_shrink_with_the_batch():
    model, sizes = byte_model(), []
    decoder = Decoder(model, None)
    requests = [request(i, "ab", max_new_tokens=3 + 4 * (i == 0), seed=i) for i in range(5)]
    for n in range(8):
        decoder.step(Work(tuple(requests) if n == 0 else ()))
        sizes.append(decoder._steps.bucket)
    assert sizes == [0, 8, 8, 1, 1, 1, 0, 0]


@pytest.mark.parametrize(
    ("routing", "read"),
    [(None, 1 << 30), (None, 3), (HALT, 5), (SKIP, 1 << 30)],
    ids=["plain", "plain in parts", "halt in parts", "skip"],
)
def test_two_ranks_answer_as_one(routing, read):
    one, other = run_ranks(2, two_ranks, routing, read)
    assert one.keys() == {0, 2, 3} and other.keys() == {1, 4}
    assert one | other == wanted(byte_model(routing=routing))


def test_a_pass_without_sequences_is_a_pass():
    decoder = Decoder(byte_model(), None)
    assert decoder.step(Work()) == []
    made = drive(decoder, {0: REQUESTS[:1]}, 20)
    assert made == wanted(byte_model(), REQUESTS[:1])
    assert decoder.step(Work()) == []


def test_a_dropped_sequence_leaves_the_others_alone():
    model = byte_model()
    decoder = Decoder(model, None)
    first, second, third, *_ = REQUESTS
    made = drive(decoder, {0: [first, second, third]}, 3)
    events = decoder.step(Work(drop=(first.id, 99)))
    assert [event.id for event in events] == [second.id, third.id]
    rest = drive(decoder, {}, 20)
    for one, event in zip((second, third), events, strict=True):
        tokens = [*made[one.id], event.token, *rest[one.id]]
        assert tokens == wanted(model, [one], None)[one.id]


def test_the_stop_token_ends_a_sequence_and_is_not_told():
    model = byte_model(std=1.0)
    one = request(0, "a", temperature=1.5, max_new_tokens=30)
    free = wanted(model, [one], None)[0]
    at = 3
    assert free[at] not in free[:at]
    decoder = Decoder(model, free[at])
    events = [decoder.step(Work((one,) if n == 0 else ()))[0] for n in range(at + 1)]
    assert [event.token for event in events] == [*free[:at], None]
    assert events[-1] == Event(0, None, "stop") and decoder.step(Work()) == []


def test_a_request_goes_on_where_another_generation_left_it():
    model = byte_model()
    for one in REQUESTS:
        whole = wanted(model, [one], None)[one.id]
        resumed = type(one)(one.id, one.prompt, one.sampling, made=tuple(whole[:3]))
        assert drive(Decoder(model, None), {0: [resumed]}, 30)[one.id] == whole[3:]


def test_memory_is_given_back():
    decoder = Decoder(byte_model(), None)
    pool, sizes = decoder._cache.pool, []
    for n in range(3):
        drive(decoder, {0: [request(n, "x" * 50, max_new_tokens=30)]}, 30)
        assert pool.used == 0
        sizes.append(pool.kv_2NJSC.size(1))
    assert sizes == sizes[:1] * 3 and sizes[0] >= 1 + 2 * 3  # 2 pages in each of 3 layers


def test_a_model_that_looks_ahead_is_refused():
    with pytest.raises(NotCausalError, match="policy=expert_choice chooses by looking at later"):
        Decoder(byte_model(policy="expert_choice"), None)


@pytest.mark.gpu
@pytest.mark.parametrize("routing", [None, SKIP], ids=["experts", "skip"])
def test_on_a_gpu_steps_are_graphs_and_a_request_gets_the_text_of_generate(routing):
    experts = 0 if routing else 6
    model = byte_model(dim=64, kernels="triton", hidden=16, routing=routing, experts=experts)
    model.to("cuda")
    requests = [
        request(i, text, temperature=i % 3 / 2, seed=i, max_new_tokens=20)
        for i, text in enumerate(["ab", "c", "defgh", "i" * 70, "jk"])
    ]
    decoder = Decoder(model, None)
    made = drive(decoder, {0: requests[:1], 5: requests[1:]}, 60)
    assert made == wanted(model, requests, None)
    assert decoder._steps.uncaptured == ""
    # the graph of 1 went when the pages of 5 had to be found; 4 are left when the first has ended
    assert {bucket for bucket, *_ in decoder._steps._graphs} == {4, 8}


@pytest.mark.gpu
def test_a_captured_step_waits_for_nothing():
    model = byte_model(dim=64, hidden=16).to("cuda", torch.bfloat16)
    decoder = Decoder(model, None)
    one = request(0, "abc", max_new_tokens=50)
    drive(decoder, {0: [one]}, 5)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            decoder._steps.launch()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert decoder._steps.uncaptured == ""


def first_gap(model, one, made):
    """Between the two likeliest logits of `generate`'s text where it and `made` part; 0: never."""
    (text,) = wanted(model, [one], None).values()
    assert len(made) == len(text) == one.sampling.max_new_tokens
    parted = [i for i, (a, b) in enumerate(zip(made, text, strict=True)) if a != b]
    if not parted:
        return 0.0
    device = model.embed.weight.device
    ids_T = torch.tensor([*one.prompt, *text[: parted[0]]], device=device)
    position_T = torch.arange(len(ids_T), dtype=torch.int32, device=device)
    with torch.no_grad():
        logits_TV = model(ids_T, position_T, torch.tensor([0, len(ids_T)]).int()).logits_TV
    first, second = logits_TV[-1].topk(2).values.tolist()
    return first - second


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("experts", [0, 6])
@pytest.mark.parametrize("device", DEVICES)
def test_in_bf16_texts_part_where_two_tokens_are_equally_likely(device, experts):
    model = byte_model(std=4.0, dim=64, experts=experts).to(device, torch.bfloat16).eval()
    texts = ["never far", "x", "the same in any batch", "read in parts, as it is long", "b", "or"]
    requests = [request(i, s, temperature=0.0, max_new_tokens=40) for i, s in enumerate(texts)]
    joined = {0: requests[:2], 5: requests[2:4], 11: requests[4:]}
    made = drive(Decoder(model, None, ahead=1), joined, 120, read=7)
    gaps = [first_gap(model, one, made[one.id]) for one in requests]
    assert max(gaps) < 0.05, gaps


def test_a_gap_is_seen_where_texts_part():
    model = byte_model(std=8.0).eval()
    one = request(0, "ab", temperature=0.0)
    (text,) = wanted(model, [one], None).values()
    assert first_gap(model, one, text) == 0
    assert first_gap(model, one, [*text[:5], text[5] + 1, *text[6:]]) > 0.05
