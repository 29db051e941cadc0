"""Generate and Health over a real connection and a real engine."""

import asyncio

import grpc
import pytest

from moe_router.config import ServeConfig
from moe_router.models import Sampling, generate
from moe_router.serving import router_pb2 as pb
from moe_router.serving.engine import Engine
from moe_router.serving.group import OneRank
from moe_router.serving.grpc_generation import generation_adder
from moe_router.serving.grpc_server import serve_grpc
from moe_router.serving.router_pb2_grpc import GenerationStub
from moe_router.serving.scheduler import Limits
from tests.serving.work import TOKENIZER, byte_model

MODEL = byte_model()
STOP = TOKENIZER.document_id


def talk(client, **limits):
    async def go():
        group, defaults = OneRank(MODEL, STOP), ServeConfig(max_new_tokens=6)
        async with Engine(group, TOKENIZER, "tiny", defaults, Limits(**limits)) as engine:
            server, port = await serve_grpc([generation_adder(engine)])
            try:
                async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                    return await asyncio.wait_for(client(GenerationStub(channel)), 30)
            finally:
                await server.stop(None)

    return asyncio.run(go())


async def events(stub, **asked):
    return [event async for event in stub.Generate(pb.GenerateRequest(**asked))]


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [
        ({"text": "The "}, [STOP, *b"The "]),
        ({"tokens": pb.TokenIds(ids=[84, 104])}, [84, 104]),
    ],
)
def test_generate_is_the_text_of_generate(prompt, ids):
    asked = {"max_tokens": 8, "temperature": 1.0, "seed": 2, "top_k": 40, "top_p": 0.75}
    told = talk(lambda stub: events(stub, model="tiny", **prompt, **asked))
    sampling = Sampling(max_new_tokens=8, temperature=1.0, seed=2, top_k=40, top_p=0.75)
    made = generate(MODEL, [ids], sampling, stop_id=STOP)[0]
    assert [token for event in told for token in event.tokens] == made
    assert "".join(event.text for event in told) == TOKENIZER.decode(made)
    assert [event.finish_reason for event in told] == [""] * (len(told) - 1) + ["length"]
    assert (told[-1].prompt_tokens, told[-1].completion_tokens) == (len(ids), 8)
    assert all(event.prompt_tokens == 0 for event in told[:-1])


def test_what_is_left_out_is_the_runs():
    told = talk(lambda stub: events(stub, text="a", seed=1))
    assert told[-1].completion_tokens == 6


def test_health_says_which_model():
    assert talk(lambda stub: stub.Health(pb.HealthRequest())) == pb.HealthReply(
        ok=True, model="tiny"
    )


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({}, "prompt=nothing: want text or tokens"),
        ({"text": "a", "model": "gpt"}, "model=gpt: want tiny, or nothing"),
        ({"tokens": pb.TokenIds()}, "prompt 0 is empty"),
        ({"text": "a", "temperature": float("nan")}, "temperature=nan: want 0 or more"),
        ({"text": "a", "stop": [""]}, "stop="),
        ({"text": "a", "stop": ["x"] * 5}, "stop=5 texts: want up to 4 texts, each of 1..256"),
        ({"text": "a", "stop": ["x" * 257]}, "stop=1 texts: want up to 4 texts, each of 1..256"),
        ({"text": "a", "compute_budget": 1.5}, "compute budget 1.5: want 0, the least"),
    ],
)
def test_impossible_requests_are_invalid_arguments(asked, message):
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        talk(lambda stub: events(stub, **asked))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert refused.value.details().startswith(message)


def test_a_full_queue_is_resource_exhausted():
    async def clients(stub):
        calls = [
            asyncio.ensure_future(events(stub, text="a", max_tokens=200, seed=1)) for _ in range(6)
        ]
        return await asyncio.gather(*calls, return_exceptions=True)

    codes = {
        answer.code() if isinstance(answer, grpc.aio.AioRpcError) else "ok"
        for answer in talk(clients, slots=1, queue=1)
    }
    assert codes == {"ok", grpc.StatusCode.RESOURCE_EXHAUSTED}


def test_a_client_that_cancels_is_forgotten():
    async def client(stub):
        call = stub.Generate(pb.GenerateRequest(text="a", max_tokens=30_000, seed=1))
        await call.read()
        call.cancel()
        return await events(stub, text="b", max_tokens=2, seed=1)

    assert talk(client, slots=1)[-1].completion_tokens == 2
