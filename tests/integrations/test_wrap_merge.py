"""Merging wrapped around encoders of transformers: tokens that merged are as tokens that are equal,
the output has a state for each of them, and what is saved comes back."""

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoModel,
    BertConfig,
    BertModel,
    DeiTConfig,
    DeiTModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaModel,
    ViTConfig,
    ViTModel,
)

import moe_router
from moe_router import Context, Ledger
from moe_router.errors import ConfigError
from moe_router.integrations.wrap import load_wrapped, set_context
from moe_router.layers.merge import kept_of
from tests.integrations.test_wrap import LENGTHS, SIZES, batch, encoder_of, made

IMAGE = {"image_size": 16, "patch_size": 4}


def halves(layer):
    """Its keys, its attention and its feed-forward, with their residuals: of (n, D)."""
    if hasattr(layer, "layernorm_before"):
        before, after = layer.layernorm_before, layer.layernorm_after
        return (
            lambda x: layer.attention.k_proj(before(x)),
            lambda x: x + layer.attention(before(x)[None])[0][0],
            lambda x: x + layer.mlp(after(x)),
        )
    return (
        layer.attention.self.key,
        lambda x: layer.attention(x[None])[0][0],
        layer.feed_forward_chunk,
    )


def joined(key_MC, keep):
    """The partner of each of M slots that joins another, by loops."""
    unit, M = F.normalize(key_MC, dim=-1), len(key_MC)
    looks = [(float((unit[a] @ unit[1::2].T).max()), a) for a in range(2, M, 2)]
    looks = sorted(looks, reverse=True)[: M - kept_of(M, keep)]
    return {a: 1 + 2 * int((unit[a] @ unit[1::2].T).argmax()) for _, a in looks}


def by_definition(layers, x_TD, routed, keep):
    """Every layer computes every token of one text densely; those that have merged have one state,
    and nobody knows of sizes."""
    slots = [[t] for t in range(len(x_TD))]
    heads = SIZES["num_attention_heads"]
    for i, layer in enumerate(layers):
        keys, attend, feed = halves(layer)
        if i in routed:
            own = torch.tensor([members[0] for members in slots])
            key_MC = keys(x_TD)[own].view(len(own), heads, -1).mean(1)
            partners = joined(key_MC, keep)
            for a, b in partners.items():
                slots[b] = slots[b] + slots[a]
            slots = [members for m, members in enumerate(slots) if m not in partners]
        x_TD = attend(x_TD)
        for members in slots:
            x_TD = x_TD.index_copy(
                0, torch.tensor(members), x_TD[members].mean(0).expand(len(members), -1)
            )
        x_TD = feed(x_TD)
    return x_TD, len(slots)


@pytest.mark.parametrize("keep", [0.5, 0.7])
@pytest.mark.parametrize(
    "kind, config",
    [(BertModel, BertConfig), (RobertaModel, RobertaConfig)],
    ids=["bert", "roberta"],
)
def test_a_merged_token_is_as_many_equal_ones(kind, config, keep):
    inputs, dense = batch(), made(kind, config).eval()
    dense.set_attn_implementation("eager")
    wrapped = moe_router.wrap(made(kind, config), kind="merge", keep=keep, first=0, every=2)
    with torch.no_grad():
        got = wrapped(**inputs).last_hidden_state
        for i, here in enumerate(inputs["attention_mask"].bool()):
            x_TD = dense.embeddings(input_ids=inputs["input_ids"][i, here][None])[0]
            want, left = by_definition(dense.encoder.layer, x_TD, (0, 2), keep)
            assert left < LENGTHS[i] or LENGTHS[i] < 4
            torch.testing.assert_close(got[i, here], want, rtol=1e-4, atol=1e-4)
            assert (got[i, ~here] == 0).all()


@pytest.mark.parametrize("keep", [0.6, 1.0])
@pytest.mark.parametrize(
    "kind, config", [(ViTModel, ViTConfig), (DeiTModel, DeiTConfig)], ids=["vit", "deit"]
)
def test_patches_merge(kind, config, keep, tmp_path):
    torch.manual_seed(0)
    dense, images = kind(config(**SIZES, **IMAGE)).eval(), torch.randn(2, 3, 16, 16)
    dense.save_pretrained(tmp_path)
    dense.set_attn_implementation("eager")
    wrapped = moe_router.wrap(AutoModel.from_pretrained(tmp_path), kind="merge", keep=keep)
    with torch.no_grad():
        got = wrapped(images).last_hidden_state
        if keep == 1:
            want = dense(images).last_hidden_state
        else:
            parts = [by_definition(dense.layers, x, (1, 3), keep) for x in dense.embeddings(images)]
            want = dense.layernorm(torch.stack([x for x, _ in parts]))
            assert {left for _, left in parts} == {kept_of(kept_of(got.size(1), keep), keep)}
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_what_ran_is_counted():
    """Layer 1 merges 8 tokens to 4 before its feed-forward, layer 3 these to 3: one joins at most
    by each second of those after the first."""
    model, ledger = moe_router.wrap(made(), kind="merge", keep=0.5), Ledger()
    set_context(model, Context(ledger=ledger))
    with torch.no_grad():
        model(**batch((8,), 8))
    ran, dense = ledger.by_op()["blocks"]
    attention, feed, scores = 2 * 4 * 32 * 32, 2 * 2 * 32 * 48, 4 * 32
    halves = [(8, 8), (8, 5), (5, 5), (5, 3)]
    assert [kept_of(8, 0.5), kept_of(5, 0.5)] == [5, 3]
    assert ran == sum(a * attention + a * a * scores + f * feed for a, f in halves)
    assert dense == 4 * (8 * attention + 64 * scores + 8 * feed)


@pytest.mark.parametrize("more", [{}, {"router": "position"}, {"frozen": True}])
def test_what_is_saved_comes_back_and_gradients_pass(more, tmp_path):
    """Nothing is learned by merging itself; the controls keep what they were drawn as."""
    model, inputs = moe_router.wrap(made(), kind="merge", keep=0.6, freeze=False, **more), batch()
    model.train()(**inputs).last_hidden_state.square().sum().backward()
    layer = encoder_of(model).layers[0]
    assert layer.attention.self.key.weight.grad.abs().sum() > 0
    assert all(p.grad is None for n, p in model.named_parameters() if ".merges." in n)
    model.eval().save_pretrained(tmp_path)
    again = load_wrapped(AutoModel, tmp_path)
    with torch.no_grad():
        want = model(**inputs).last_hidden_state
        assert torch.equal(again(**inputs).last_hidden_state, want)


def test_what_cannot_merge_says_why():
    decoder = LlamaForCausalLM(
        LlamaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=2, num_attention_heads=2)
    )
    why = r"LlamaForCausalLM: kind=merge wants BERT.*; it looks at later tokens"
    with pytest.raises(ConfigError, match=why):
        moe_router.wrap(decoder, kind="merge")
    for wrong, message in (
        ({"keep": 0.4}, "keep=0.4: want 0.5 <= keep <= 1"),
        ({"router": "mlp"}, "router=mlp: want linear"),
        ({"curriculum": 5}, "curriculum: kind=merge wants every"),
        ({"first": 4}, "first=4: want at most 3"),
    ):
        with pytest.raises(ConfigError, match=message):
            moe_router.wrap(made(), kind="merge", **wrong)
