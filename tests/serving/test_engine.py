"""Requests to streams, over one rank and over ranks that are lost; no Ray."""

import asyncio
from contextlib import aclosing

import pytest

from moe_router.config import ServeConfig
from moe_router.errors import ClusterError, ConfigError, QueueFullError, WorkerLostError
from moe_router.models import Sampling, generate
from moe_router.serving.decoder import Decoder
from moe_router.serving.engine import Engine
from moe_router.serving.group import OneRank
from moe_router.serving.requests import Ask, Health
from moe_router.serving.scheduler import Limits
from tests.serving.work import TOKENIZER, byte_model

MODEL = byte_model()
STOP = TOKENIZER.document_id


class Fragile(OneRank):
    """Loses all that it held, instead of making the passes `at`."""

    def __init__(self, *at, hope=True):
        super().__init__(MODEL, STOP)
        self.at, self.hope, self.passes, self.recoveries = set(at), hope, 0, 0
        self.gone = False

    async def step(self, work):
        self.passes += 1
        if self.passes in self.at:
            raise WorkerLostError("rank 0 died")
        return await super().step(work)

    async def ping(self):
        if self.gone:
            raise WorkerLostError("rank 0 does not answer")

    async def recover(self, lost):
        self.recoveries += 1
        self.gone = False
        if not self.hope:
            raise ClusterError(f"gave up: {lost}")
        self._decoder = Decoder(MODEL, STOP)


def serve(client, group=None, **limits):
    async def go():
        made = group or OneRank(MODEL, STOP)
        async with Engine(
            made, TOKENIZER, "tiny", ServeConfig(max_new_tokens=9), Limits(**limits)
        ) as engine:
            return await asyncio.wait_for(client(engine), 30)

    return asyncio.run(go())


async def collect(engine, *prompts, **asked):
    """Text, tokens and reason for each prompt."""
    answers = [["", [], ""] for _ in prompts]
    async for piece in engine.stream(Ask(prompts=prompts, **asked)):
        answer = answers[piece.index]
        assert not answer[2]  # nothing follows the last piece
        answer[0] += piece.text
        answer[1] += piece.tokens
        answer[2] = piece.finish
        assert piece.made == len(answer[1])
    return [tuple(answer) for answer in answers]


def wanted(prompt, **sampling):
    ids = [STOP, *prompt.encode()]
    made = generate(MODEL, [ids], Sampling(**sampling), stop_id=STOP)[0]
    reason = "length" if len(made) == sampling["max_new_tokens"] else "stop"
    return TOKENIZER.decode(made), made, reason


def test_each_of_many_clients_gets_the_text_of_generate():
    async def clients(engine):
        return await asyncio.gather(
            *(
                collect(engine, f"text {n}", max_tokens=5 + n, temperature=n / 8, seed=n)
                for n in range(12)
            )
        )

    answers = serve(clients, slots=4, prefill=3)
    for n, (answer,) in enumerate(answers):
        assert answer == wanted(f"text {n}", max_new_tokens=5 + n, temperature=n / 8, seed=n)


def test_a_call_with_many_prompts_is_answered_one_by_one():
    prompts = ("The ", "a", "The ")
    answers = serve(lambda engine: collect(engine, *prompts, seed=4, temperature=1.0))
    assert answers[0] == answers[2] != answers[1]
    assert answers == [wanted(p, max_new_tokens=9, temperature=1.0, seed=4) for p in prompts]


def test_without_a_seed_texts_differ():
    answers = serve(lambda engine: collect(engine, "a", "a", temperature=3.0, max_tokens=20))
    assert answers[0] != answers[1]


def test_a_stop_string_ends_the_answer_and_the_work_on_it():
    text, made, _ = wanted("The ", max_new_tokens=40, temperature=1.0, seed=1)
    stop = text[4:6]
    group = Fragile()

    async def client(engine):
        return await collect(engine, "The ", max_tokens=40, temperature=1.0, seed=1, stop=(stop,))

    ((got, tokens, reason),) = serve(client, group)
    assert (got, reason) == (text[: text.index(stop)], "stop")
    assert tokens == made[: len(tokens)] and len(tokens) < 40 and group.passes <= len(tokens) + 1


def test_who_goes_away_is_forgotten():
    group = Fragile()

    async def client(engine):
        async with aclosing(engine.stream(Ask(prompts=("a",), max_tokens=5_000, seed=1))) as pieces:
            async for piece in pieces:
                if piece.made >= 3:
                    break
        await collect(engine, "b", max_tokens=2, seed=1)
        return group.passes

    assert serve(client, group, slots=1) < 500


@pytest.mark.parametrize("at", [(1,), (4,), (3, 4, 9)])
def test_a_stream_goes_on_over_a_loss(at):
    group = Fragile(*at)

    async def clients(engine):
        return await asyncio.gather(
            collect(engine, "one", "two", seed=3, temperature=1.0, max_tokens=15),
            collect(engine, "three", seed=3, temperature=1.0, max_tokens=4),
        )

    several, (one,) = serve(clients, group)
    asked = {"temperature": 1.0, "seed": 3}
    assert several == [wanted(p, max_new_tokens=15, **asked) for p in ("one", "two")]
    assert one == wanted("three", max_new_tokens=4, **asked)
    assert group.recoveries == len(at)


def test_a_loss_is_found_while_nothing_is_asked():
    group = Fragile()

    async def client(engine):
        await engine.check()
        group.gone = True
        await engine.check()
        while not group.recoveries:
            await asyncio.sleep(0)
        return await collect(engine, "a", seed=0, temperature=0.8)

    assert serve(client, group) == [wanted("a", max_new_tokens=9, temperature=0.8)]


def test_health_is_red_while_ranks_are_made_anew():
    class Slow(Fragile):
        async def recover(self, lost):
            self.seen = await self.engine.health()
            await super().recover(lost)

    group = Slow(2)

    async def client(engine):
        group.engine = engine
        await collect(engine, "a")
        return await engine.health()

    assert serve(client, group) == Health(True, "", "tiny")
    assert group.seen == Health(False, "rank 0 died", "tiny")


def test_without_hope_everybody_is_told():
    async def clients(engine):
        first = await asyncio.gather(
            collect(engine, "a"), collect(engine, "b"), return_exceptions=True
        )
        health = await engine.health()
        with pytest.raises(ClusterError, match="gave up: rank 0 died"):
            await engine.check()
        with pytest.raises(ClusterError, match="gave up: rank 0 died"):
            await collect(engine, "c")
        return first, health

    first, health = serve(clients, Fragile(3, hope=False))
    assert [type(error) for error in first] == [ClusterError] * 2
    assert health == Health(False, "gave up: rank 0 died", "tiny")


def test_a_bug_in_a_pass_leaves_nobody_waiting(caplog):
    group = OneRank(MODEL, STOP)
    group._decoder = None
    with pytest.raises(ClusterError, match="AttributeError in a pass; the server's log has it"):
        serve(lambda engine: collect(engine, "a"), group)
    assert "a pass failed" in caplog.text


def test_a_bug_in_a_recovery_leaves_nobody_waiting(caplog):
    class Broken(Fragile):
        async def recover(self, lost):
            raise RuntimeError("no port is free")

    async def client(engine):
        with pytest.raises(ClusterError, match="RuntimeError in a recovery; the server's log"):
            await asyncio.wait_for(collect(engine, "a"), 5)
        with pytest.raises(ClusterError):  # by which Serve makes the replica anew
            await engine.check()

    serve(client, Broken(2))
    assert "ranks cannot be made anew" in caplog.text


def test_a_full_queue_is_said_at_once():
    async def clients(engine):
        calls = [
            asyncio.ensure_future(collect(engine, "a", max_tokens=50, seed=1)) for _ in range(3)
        ]
        await asyncio.sleep(0)
        with pytest.raises(QueueFullError, match="ask again later"):
            await collect(engine, "b", "c")
        return await asyncio.gather(*calls)

    assert len(serve(clients, slots=1, queue=4)) == 3


@pytest.mark.parametrize(
    ("prompts", "asked", "message"),
    [
        ((), {}, "prompt=nothing: want at least one prompt"),
        (((),), {}, "prompt 0 is empty"),
        (("a", (3, 999)), {}, "prompt 1 holds token 999: want 0..256"),
        (("a",), {"temperature": -1.0}, "temperature=-1.0: want 0 or more"),
        (("a",), {"max_tokens": 0}, "max_tokens=0: want 1 or more, or echo: true"),
        (("a",), {"max_tokens": 10**6}, r"prompt \+ max_tokens=1000002: want at most"),
        (("a",), {"stop": ("x", "")}, "stop=.*: want texts that are not empty"),
    ],
)
def test_impossible_requests_are_refused(prompts, asked, message):
    with pytest.raises(ConfigError, match=message):
        serve(lambda engine: collect(engine, *prompts, **asked))
