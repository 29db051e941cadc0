"""Skipping wrapped around decoders of transformers: executed equals masked, one pass equals
decoding with a cache, and routers learn while the model stays."""

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen3Config,
)

import moe_router
from moe_router import Context, Ledger
from moe_router.errors import ConfigError
from moe_router.integrations.decoder import RoutedLayer
from moe_router.integrations.wrap import load_wrapped

SIZES = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 49,
}  # fmt: skip
LENGTHS, S = (9, 4, 7), 9


def made(config=LlamaConfig, **more):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config(**SIZES | more)).eval()


def wrapped(**more):
    """Two of four layers skip, and which tokens differs from text to text."""
    model = moe_router.wrap(made(), kind="skip", **{"first": 1, "every": 2, "keep": 0.5} | more)
    for layer in routed(model):
        nn.init.normal_(layer.skip.router.score.weight, generator=torch.Generator().manual_seed(0))
    return model


def routed(model):
    return [module for module in model.modules() if isinstance(module, RoutedLayer)]


def batch(left=True):
    torch.manual_seed(1)
    ids = torch.randint(2, 49, (len(LENGTHS), S))
    length = torch.tensor(LENGTHS)[:, None]
    mask = torch.arange(S) >= S - length if left else torch.arange(S) < length
    return {"input_ids": ids.masked_fill(~mask, 0), "attention_mask": mask.long()}


def by_definition(model, ids):
    """One text: each layer computes every token, and who passes by is not seen and not changed.
    Logits, and how many tokens each routed layer takes."""
    base, taken = model.model, []
    x = base.embed_tokens(ids)[None]
    at = torch.arange(len(ids))
    turn = base.rotary_emb(x, at[None])
    for layer in base.layers:
        takes = torch.ones(len(ids), dtype=torch.bool)
        plain = layer
        if isinstance(layer, RoutedLayer):
            takes = layer.skip.router(x[0], at) > 0
            taken.append(int(takes.sum()))
            plain = super(RoutedLayer, layer)
        seen = (at[:, None] >= at) & takes | torch.eye(len(ids), dtype=torch.bool)
        out = plain.forward(x, seen[None, None], position_embeddings=turn, position_ids=at[None])
        x = torch.where(takes[:, None], out, x)
    return model.lm_head(base.norm(x))[0], taken


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_executed_is_masked_whatever_padding_and_neighbours_there_are(left):
    model, inputs = wrapped(), batch(left)
    with torch.no_grad():
        logits = model(**inputs).logits
        for i, here in enumerate(inputs["attention_mask"].bool()):
            want, taken = by_definition(model, inputs["input_ids"][i, here])
            assert i or (min(taken) > 0 and max(taken) < S)
            torch.testing.assert_close(logits[i, here], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", [LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config])
def test_keeping_all_is_the_model_itself_with_its_gradients(config):
    more = {"sliding_window": None} if config is MistralConfig else {}
    inputs = batch()
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    seen = []
    for wraps in (False, True):
        model = made(config, **more).train()
        if wraps:
            moe_router.wrap(model, kind="skip", keep=1.0, freeze=False, predictor_loss=0.0)
            for layer in routed(model):  # its gradient reaches the layers before it too
                nn.init.zeros_(layer.skip.router.score.weight)
        out = model(**inputs, use_cache=False)
        here = inputs["attention_mask"].bool()
        weights = [p for n, p in model.named_parameters() if ".skip." not in n]
        seen.append([out.logits[here], *torch.autograd.grad(out.loss, weights)])
    for one, other in zip(*seen, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def assert_cache_is_one_pass(model, inputs, *ways):
    """Ways: of cutting the text into chunks, by their sizes."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    at, here = (mask.cumsum(1) - 1).clamp(min=0), mask.bool()
    with torch.no_grad():
        want = model(**inputs, position_ids=at).logits
        for sizes in ways:
            cache, got, end = None, [], 0
            for n in sizes:
                now, end = slice(end, end + n), end + n
                out = model(
                    ids[:, now], attention_mask=mask[:, :end], position_ids=at[:, now],
                    past_key_values=cache, use_cache=True,
                )  # fmt: skip
                cache = out.past_key_values
                got.append(out.logits)
            torch.testing.assert_close(torch.cat(got, 1)[here], want[here], rtol=1e-4, atol=1e-4)


def test_decoding_with_a_cache_is_one_pass_over_the_text():
    """Token by token, and in chunks; whom a layer skips leaves no key that is seen later."""
    assert_cache_is_one_pass(wrapped(), batch(), [1] * S, [6, 1, 1, 1], [3, 4, 2])


@pytest.mark.parametrize("beams", [1, 3])
def test_generate_is_the_same_with_and_without_a_cache(beams):
    model, inputs = wrapped(), batch()
    texts = [
        model.generate(
            **inputs, max_new_tokens=8, do_sample=False, num_beams=beams, use_cache=caches
        )
        for caches in (True, False)
    ]
    assert torch.equal(*texts) and texts[0].size(1) > S


def test_who_decides_and_what_ran_is_counted():
    model = wrapped()
    ids = batch()["input_ids"][0]
    with torch.no_grad():
        kept = by_definition(model, ids)[1]
        ledger = Ledger()
        for layer in routed(model):
            layer.context = Context(ledger=ledger)
        model(ids[None], use_cache=False)
    ran, dense = ledger.by_op()["blocks"]
    matrices, scores = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48), 4 * 32

    def cost(n):
        return n * matrices + n * (n + 1) // 2 * scores

    assert dense == 2 * cost(S) and ran == sum(map(cost, kept))
    assert min(kept) > 0 and max(kept) < S


def test_the_routers_alone_are_trained_and_saved(tmp_path):
    """By the loss of the model, and by one that only they see."""
    model = wrapped(predictor="mlp").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inputs = batch()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    optimizer.step()
    moved = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert all(".skip." in name for name in moved)
    assert {name.split(".skip.")[1].split(".")[0] for name in moved} == {"router", "predictor"}
    model.eval().save_pretrained(tmp_path)
    again = load_wrapped(AutoModelForCausalLM, tmp_path)
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)


def test_what_cannot_be_wrapped_says_why():
    gpt = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1))
    windows = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4))
    for model in (gpt, windows):
        with pytest.raises(ConfigError, match="kind=skip wants Llama, Mistral, Qwen2 or Qwen3"):
            moe_router.wrap(model, kind="skip")
    with pytest.raises(ConfigError, match="first=4: want at most 3"):
        moe_router.wrap(made(), kind="skip", first=4)
    with pytest.raises(ConfigError, match="LlamaForCausalLM: kind=prune wants BERT"):
        moe_router.wrap(made(), kind="prune")
