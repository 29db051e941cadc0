"""A compute budget per request: its tokens are those of `generate` at that budget, whatever its
neighbours ask for."""

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_router.errors import ClusterError, ConfigError, DataError, WorkerLostError
from moe_router.models import Sampling, generate
from moe_router.serving.decoder import Decoder
from moe_router.serving.engine import Engine
from moe_router.serving.group import OneRank
from moe_router.serving.requests import Ask
from moe_router.training.calibrate import Shifts, calibrate
from moe_router.training.data import load_dataset
from tests.gloo import run_ranks
from tests.serving.budget_work import routed_model, two_ranks, with_shifts
from tests.serving.web import complete, served
from tests.serving.work import TOKENIZER, drive

STOP = TOKENIZER.document_id
MODELS = {
    (kind, moe): routed_model(kind, moe)
    for kind, moe in [
        ("skip", False),
        ("skip", True),
        ("leap", False),
        ("halt", False),
        ("halt", True),
    ]
}
NAMES = [f"{kind}{'+experts' * moe}" for kind, moe in MODELS]


def wanted(model, requests):
    texts = {}
    for one in requests:
        model.shift_routers(one.shift)
        texts[one.id] = generate(model, [one.prompt], one.sampling, stop_id=STOP)[0]
    model.shift_routers(0.0)
    return texts


@pytest.mark.parametrize("which", MODELS, ids=NAMES)
@settings(max_examples=4, deadline=None)
@given(
    st.lists(st.sampled_from([-64.0, -3.0, 0.0, 1.5, 64.0]), min_size=5, max_size=5),
    st.lists(st.integers(0, 9), min_size=5, max_size=5),
    st.sampled_from([1, 3, 100]),
)
def test_neighbours_of_other_budgets_change_nothing(which, shifts, arrivals, read):
    model, _ = MODELS[which]
    admitted = {}
    for arrival, one in zip(arrivals, with_shifts(shifts), strict=True):
        admitted.setdefault(arrival, []).append(one)
    made = drive(Decoder(model, STOP, ahead=1), admitted, 120, read)
    assert made == wanted(model, with_shifts(shifts))


@pytest.mark.parametrize("which", MODELS, ids=NAMES)
def test_another_budget_is_another_text(which):
    model, _ = MODELS[which]
    least, most = (wanted(model, with_shifts([shift] * 5)) for shift in (-64.0, 64.0))
    assert sum(least[i] != most[i] for i in least) >= 3


@pytest.mark.parametrize("kind", ["skip", "halt"])
def test_two_ranks_find_the_same_shifts_and_answer_as_one(kind):
    budgets = [0.0, 0.3, 1.0, 0.5, 0.75]
    (found, one), (same, other) = run_ranks(2, two_ranks, kind, budgets)
    model, config = MODELS[kind, True]
    shifts = Shifts(model, config)
    shifts.prepare(0.5)
    assert found == same == [shifts.find(budget) for budget in budgets]
    assert one.keys() == {0, 2, 3} and other.keys() == {1, 4}
    assert one | other == wanted(model, with_shifts(found))


class Counted(OneRank):
    """Counts the shifts that are found; `errors` come first."""

    def __init__(self, which, *errors):
        model, config = MODELS.get(which) or routed_model(None)
        super().__init__(model, STOP, Shifts(model, config))
        self.found, self.errors = 0, list(errors)

    async def shift_of(self, budget):
        if self.errors:
            raise self.errors.pop(0)
        self.found += 1
        return await super().shift_of(budget)

    async def recover(self, lost):
        """It is still here."""


def serve(client, group):
    async def go():
        async with Engine(group, TOKENIZER, "tiny") as engine:
            return await asyncio.wait_for(client(engine), 60)

    return asyncio.run(go())


async def tokens(engine, prompt, budget, **asked):
    ask = Ask(prompts=(prompt,), max_tokens=10, temperature=0.9, seed=4, compute_budget=budget)
    return [token async for piece in engine.stream(ask) for token in piece.tokens]


def test_clients_get_what_generate_gives_at_their_budget():
    model, config = MODELS["skip", True]
    budgets = (0.0, None, 0.35, 1, 0.351, 0.35)
    group = Counted(("skip", True))

    async def clients(engine):
        return await asyncio.gather(*(tokens(engine, "The ", budget) for budget in budgets))

    answers = serve(clients, group)
    assert group.found == 3  # 0.351 is 0.35 in hundredths
    dataset = load_dataset(config.data)
    sampling = Sampling(max_new_tokens=10, temperature=0.9, seed=4)
    for budget, answer in zip(budgets, answers, strict=True):
        if budget is not None:
            calibrate(model, dataset, config, budget)
        want = generate(model, [[STOP, *b"The "]], sampling, stop_id=STOP)[0]
        model.shift_routers(0.0)
        assert answer == want
    assert len({tuple(answer) for answer in answers}) >= 3


def test_over_http_a_budget_is_a_field_of_the_request():
    model, config = MODELS["skip", True]
    asked = {"max_tokens": 10, "temperature": 0.9, "seed": 4}
    with served(model=model, shifts=Shifts(model, config)) as (port, _):
        texts = [complete(port, compute_budget=b, **asked)[1] for b in (0, 1)]
        status, wrong = complete(port, compute_budget=1.5, **asked)
    dataset = load_dataset(config.data)
    for budget, answer in zip((0, 1), texts, strict=True):
        calibrate(model, dataset, config, budget)
        made = generate(
            model,
            [[STOP, *b"The "]],
            Sampling(max_new_tokens=10, temperature=0.9, seed=4),
            stop_id=STOP,
        )
        assert answer["choices"][0]["text"] == TOKENIZER.decode(made[0])
    model.shift_routers(0.0)
    assert (status, wrong["error"]["param"]) == (400, "compute_budget")


def test_a_model_without_a_budget_refuses_one_and_goes_on():
    async def client(engine):
        with pytest.raises(ConfigError, match=r"budget 0\.5: want a model whose tokens skip, halt"):
            await tokens(engine, "a", 0.5)
        with pytest.raises(ConfigError, match=r"budget 1\.5: want 0, the least, to 1, the most"):
            await tokens(engine, "a", 1.5)
        return await tokens(engine, "a", None)

    assert serve(client, Counted(None))


def test_a_rank_lost_while_a_budget_is_found_costs_nothing_but_time():
    group = Counted(("leap", False), WorkerLostError("rank 0 died"))
    assert serve(lambda engine: tokens(engine, "a", 0.5), group)
    assert group.found == 1


def test_missing_data_is_told_and_asked_for_again():
    async def client(engine):
        with pytest.raises(DataError, match="no such file"):
            await tokens(engine, "a", 0.5)
        return await tokens(engine, "a", 0.5)

    assert serve(client, Counted(("leap", False), DataError("no such file")))


def test_who_waits_for_a_budget_is_told_that_the_ranks_are_gone():
    class Hopeless(Counted):
        async def recover(self, lost):
            raise ClusterError(f"gave up: {lost}")

    group = Hopeless(("leap", False), WorkerLostError("rank 0 died"))
    with pytest.raises(ClusterError, match="gave up: rank 0 died"):
        serve(lambda engine: tokens(engine, "a", 0.5), group)
