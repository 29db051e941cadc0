"""Halting wrapped around encoders and decoders of transformers: executed equals masked in values
and gradients, whatever padding there is; caches and generate work; routers alone learn."""

import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    DeiTConfig,
    DeiTModel,
    Qwen3Config,
    ViTConfig,
    ViTModel,
)

import moe_router
from moe_router import Context, Ledger
from moe_router.errors import ConfigError
from moe_router.integrations.wrap import load_wrapped, set_context
from tests.integrations import test_wrap, test_wrap_decoder
from tests.integrations.halt_oracle import decoder_oracle, depth_of, encoder_oracle
from tests.integrations.test_wrap import SIZES

KINDS = ["tsa", "act", "ponder"]
START = -1.5  # some tokens halt after each routed layer


def spread(model):
    """Routers that tell tokens apart."""
    for i, halt in enumerate(depth_of(model).halts.values()):
        generator = torch.Generator().manual_seed(i)
        nn.init.normal_(halt.router.score.weight, std=0.5, generator=generator)
    return model


def encoder(halting, **more):
    more = {"halting": halting, "threshold": 0.6, "start": START} | more
    return spread(moe_router.wrap(test_wrap.made(), kind="halt", first=0, every=1, **more))


def decoder(halting, **more):
    more = {"halting": halting, "threshold": 0.6, "start": START} | more
    made = test_wrap_decoder.made(**more.pop("config", {}))
    return spread(moe_router.wrap(made, kind="halt", first=0, every=1, **more))


@pytest.mark.parametrize("halting", KINDS)
@pytest.mark.parametrize("made", [encoder, decoder])
def test_executed_is_masked_in_values_and_gradients(made, halting):
    model = made(halting, freeze=False)
    encodes = made is encoder
    inputs = (test_wrap if encodes else test_wrap_decoder).batch()
    out = model(**inputs)
    got = out.last_hidden_state if encodes else out.logits
    oracle, wants = (encoder_oracle if encodes else decoder_oracle), []
    for i, here in enumerate(inputs["attention_mask"].bool()):
        want, took = oracle(model, inputs["input_ids"][i, here])
        torch.testing.assert_close(got[i, here], want, rtol=1e-4, atol=1e-4)
        wants.append(want)
        assert i or took[0] > took[1] > took[2] > took[3], took
    here = inputs["attention_mask"].bool()
    torch.manual_seed(2)
    slope = torch.randn_like(got[here])
    weights = [p for n, p in model.named_parameters() if "pooler" not in n]
    grads = [torch.autograd.grad((y * slope).sum(), weights) for y in (got[here], torch.cat(wants))]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    names = [n for n, p in model.named_parameters() if "pooler" not in n]
    routers = [g for n, g in zip(names, grads[0], strict=True) if n.endswith("score.weight")]
    assert len(routers) == 3 and all(g.abs().sum() > 0 for g in routers)


@pytest.mark.parametrize(
    "kind, config", [(ViTModel, ViTConfig), (DeiTModel, DeiTConfig)], ids=["vit", "deit"]
)
def test_who_does_not_halt_has_the_models_own_state(kind, config):
    torch.manual_seed(0)
    model, images = kind(config(**SIZES, image_size=16, patch_size=4)), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        want = model.eval()(images).last_hidden_state
        moe_router.wrap(model, kind="halt", start=-40.0)
        torch.testing.assert_close(model(images).last_hidden_state, want, rtol=1e-4, atol=1e-5)


def test_decoding_with_a_cache_is_one_pass_over_the_text():
    """Token by token and in chunks: whom a layer does not compute leaves no key there."""
    inputs = test_wrap_decoder.batch()
    ways = [1] * inputs["input_ids"].size(1), [3, 4, 2]
    test_wrap_decoder.assert_cache_is_one_pass(decoder("tsa"), inputs, *ways)


@pytest.mark.parametrize("halting, config", [("tsa", {}), ("act", {"config": Qwen3Config})])
@pytest.mark.parametrize("beams", [1, 3])
def test_generate_is_the_same_with_and_without_a_cache(beams, halting, config):
    model, inputs = decoder(halting, config=config), test_wrap_decoder.batch()
    texts = [
        model.generate(
            **inputs, max_new_tokens=6, do_sample=False, num_beams=beams, use_cache=caches
        )
        for caches in (True, False)
    ]
    assert torch.equal(*texts)


def test_all_halt_at_once_and_the_cache_stays_in_step():
    """After the first layer nobody goes on: later layers compute nothing, with and without past."""
    model, inputs = decoder("tsa", start=40.0), test_wrap_decoder.batch()
    ledger = Ledger()
    set_context(model, Context(ledger=ledger))
    with torch.no_grad():
        cached = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        ran, dense = ledger.by_op()["blocks"]
        assert 0 < ran < dense
        assert torch.equal(
            cached, model.generate(**inputs, max_new_tokens=4, do_sample=False, use_cache=False)
        )


@pytest.mark.parametrize("made", [encoder, decoder])
def test_what_ran_is_counted(made):
    model, encodes, ledger = made("tsa"), made is encoder, Ledger()
    inputs = (test_wrap if encodes else test_wrap_decoder).batch()
    ids = inputs["input_ids"][0]
    set_context(model, Context(ledger=ledger))
    with torch.no_grad():
        model(ids[None])
        set_context(model, Context())
        took = (encoder_oracle if encodes else decoder_oracle)(model, ids)[1]
    linear = 4 * 32 * 32 + 2 * 32 * 48 if encodes else 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48

    def cost(n):
        return 2 * n * linear + 4 * 32 * (n * n if encodes else n * (n + 1) // 2)

    ran, dense = ledger.by_op()["blocks"]
    assert dense == 4 * cost(len(ids)) and ran == sum(map(cost, took))


@pytest.mark.parametrize("halting, key", [("tsa", "cost_loss"), ("ponder", "ponder_loss")])
def test_what_tokens_spend_is_taught_by_any_loop(halting, key, tmp_path):
    """The loss of the caller says nothing of it, and yet fewer tokens go on; only routers move."""
    model = encoder(halting, **{"start": -3.0, "prior": 0.9, key: 10.0}).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inputs, executed = test_wrap.batch(), []
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.1)
    for step in range(12):
        ledger = Ledger()
        set_context(model, Context(ledger=ledger, step=step))
        (model(**inputs).last_hidden_state.sum() * 0).backward()
        executed.append(ledger.by_op()["blocks"][0])
        optimizer.step()
        optimizer.zero_grad()
    assert executed[-1] < 0.7 * executed[0]
    moved = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert moved and all(".halts." in name for name in moved)
    set_context(model, Context())
    model.eval().save_pretrained(tmp_path)
    again = load_wrapped(AutoModel, tmp_path)
    with torch.no_grad():
        want = model(**inputs).last_hidden_state
        assert torch.equal(again(**inputs).last_hidden_state, want)


def test_nobody_leaves_in_soft_steps():
    model, inputs, ran = encoder("tsa", soft_steps=2).train(), test_wrap.batch(), []
    for step in (1, 2):
        ledger = Ledger()
        set_context(model, Context(ledger=ledger, step=step))
        model(**inputs)
        ran.append(ledger.by_op()["blocks"])
    assert ran[0][0] == ran[0][1] and ran[1][0] < ran[1][1]


def test_what_is_wrong_says_why(tmp_path):
    for wrong, message in (
        ({"keep": 0.5}, "keep: kind=halt wants every, first"),
        ({"budget": 0.5}, "budget: kind=halt wants every"),
        ({"halting": "act", "soft_steps": 3}, "soft_steps=3: want 0"),
        ({"first": 3}, "first=3: want at most 2"),
        ({"threshold": 1.5}, "threshold=1.5: want 0 < threshold <= 1"),
    ):
        for made in (test_wrap.made, test_wrap_decoder.made):
            with pytest.raises(ConfigError, match=message):
                moe_router.wrap(made(), kind="halt", **wrong)
    gpt = test_wrap_decoder.GPT2LMHeadModel(
        test_wrap_decoder.GPT2Config(n_layer=1, n_embd=8, n_head=1)
    )
    with pytest.raises(ConfigError, match=r"GPT2LMHeadModel: kind=halt wants BERT.* Llama"):
        moe_router.wrap(gpt, kind="halt")
    ids = test_wrap_decoder.batch()["input_ids"]
    with pytest.raises(ConfigError, match="output_hidden_states: after wrap each layer has other"):
        decoder("tsa")(ids, output_hidden_states=True)


def test_a_decoder_comes_back(tmp_path):
    model, ids = decoder("ponder"), test_wrap_decoder.batch()["input_ids"]
    model.save_pretrained(tmp_path)
    again = load_wrapped(AutoModelForCausalLM, tmp_path)
    assert again.config.moe_router["halting"] == "ponder"
    assert again.model.layers[-1].self_attn.layer_idx == 3  # layers are found by number
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
