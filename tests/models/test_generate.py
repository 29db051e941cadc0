import pytest
import torch

from moe_router import Context, Ledger
from moe_router.errors import ConfigError, NotCausalError
from moe_router.models import Sampling, generate
from tests.models.helpers import VOCAB, small_model

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11], [12, 13]]
GREEDY = Sampling(max_new_tokens=6, temperature=0.0)


def by_definition(model, prompt, steps):
    """Greedy, the whole text through the model for each token."""
    ids = list(prompt)
    for _ in range(steps):
        T = len(ids)
        offsets_B1 = torch.tensor([0, T], dtype=torch.int32)
        with torch.no_grad():
            ids.append(
                model.eval()(torch.tensor(ids), torch.arange(T), offsets_B1)
                .logits_TV[-1]
                .argmax()
                .item()
            )
    return ids[len(prompt) :]


@pytest.mark.parametrize("moe", [None, {}, {"shared_hidden": 8, "null_experts": 2}])
def test_greedy_is_the_argmax_of_the_whole_text_each_time(moe):
    model = small_model(moe)
    texts = generate(model, PROMPTS, GREEDY)
    assert texts == [by_definition(model, prompt, 6) for prompt in PROMPTS]


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(max_new_tokens=20, temperature=1.5)])
def test_a_text_does_not_depend_on_its_neighbours(sampling):
    model = small_model({})
    together = generate(model, PROMPTS, sampling)
    assert together == [generate(model, [prompt], sampling)[0] for prompt in PROMPTS]
    assert together[::-1] == generate(model, PROMPTS[::-1], sampling)


def test_a_seed_names_a_text():
    model = small_model({}, std=1.0)
    texts = [
        generate(model, PROMPTS, Sampling(max_new_tokens=20, temperature=1.0, seed=seed))
        for seed in (0, 0, 1)
    ]
    assert texts[0] == texts[1] != texts[2]
    assert all(0 <= token < VOCAB for text in texts[0] for token in text)


def test_a_stop_id_ends_its_sequence_and_no_other():
    model = small_model({}, std=1.0)
    sampling = Sampling(max_new_tokens=40, temperature=1.0)
    free = generate(model, PROMPTS, sampling)
    stop = free[0][5]
    stopped = generate(model, PROMPTS, sampling, stop_id=stop)
    for with_stop, without in zip(stopped, free, strict=True):
        wanted = without[: without.index(stop)] if stop in without else without
        assert with_stop == wanted
    assert len(stopped[0]) <= 5 < max(map(len, stopped))


def test_the_ledger_counts_each_token_once():
    model, ledger = small_model({"hidden": 8}), Ledger()
    generate(model, PROMPTS, GREEDY, context=Context(ledger=ledger))
    tokens = sum(map(len, PROMPTS)) + 5 * len(PROMPTS)  # the last tokens are never read
    assert ledger.totals()[0] == tokens * len(model.blocks) * 2 * 6 * 16 * 8


def test_training_mode_is_given_back():
    model = small_model({"jitter": 0.5, "capacity_factor": 0.5}).train()
    texts = generate(model, PROMPTS, GREEDY)
    assert model.training and model.blocks[0].moe.training
    assert texts == generate(model.eval(), PROMPTS, GREEDY)
    assert not model.training


def test_no_prompts_no_texts():
    assert generate(small_model(None), [], GREEDY) == []


def test_a_model_that_is_not_causal_is_refused():
    model = small_model({"policy": "expert_choice", "first": 1})
    with pytest.raises(
        NotCausalError,
        match=r"blocks.1.moe: policy=expert_choice chooses by looking at later tokens, "
        r"generate wants a causal model: train one with model.moe.policy=top_k",
    ):
        generate(model, PROMPTS, GREEDY)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "prompt 1 is empty: want at least one token"),
        ([3, 99], r"prompt 1 holds token 99: want 0..22; encode it with the model's own"),
        ([-1], r"prompt 1 holds token -1: want 0..22"),
    ],
)
def test_impossible_prompts_are_refused(prompt, message):
    with pytest.raises(ConfigError, match=message):
        generate(small_model(None), [[1], prompt], GREEDY)


@pytest.mark.gpu
def test_generation_in_bf16_on_cuda_runs_through_both_kernels():
    model = small_model({}, dim=64).to("cuda")
    with torch.autocast("cuda", torch.bfloat16):
        texts = generate(model, PROMPTS, GREEDY)
    assert [len(text) for text in texts] == [6] * 4
