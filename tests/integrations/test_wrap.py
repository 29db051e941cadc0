"""Pruning wrapped around encoders of transformers: executed equals masked, padding costs nothing,
and what cannot be wrapped says why."""

import math

import pytest
import torch
from transformers import (
    AutoModelForImageClassification,
    BertConfig,
    BertModel,
    DeiTConfig,
    DeiTForImageClassification,
    ElectraConfig,
    ElectraModel,
    GPT2Config,
    GPT2LMHeadModel,
    MPNetConfig,
    MPNetModel,
    RobertaConfig,
    RobertaModel,
    ViTConfig,
    ViTForImageClassification,
)

import moe_router
from moe_router import Context, Ledger
from moe_router.errors import CheckpointError, ConfigError
from moe_router.integrations.encoder import RoutedLayers
from moe_router.integrations.wrap import load_wrapped, set_context
from moe_router.layers.prune import Received

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "initializer_range": 0.3,  # layers that matter
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "pad_token_id": 1,
}
LENGTHS, S = (11, 4, 1, 8), 11


def made(kind=BertModel, config=BertConfig, **more):
    torch.manual_seed(0)
    return kind(config(**SIZES | more)).eval()


def batch(lengths=LENGTHS, width=S, left=False):
    """Random ids with padding at the right, or at the left."""
    torch.manual_seed(1)
    ids = torch.randint(2, 50, (len(lengths), width))
    at = torch.arange(width)[None]
    length = torch.tensor(lengths)[:, None]
    mask = at >= width - length if left else at < length
    return {"input_ids": ids.masked_fill(~mask, 1), "attention_mask": mask.long()}


def encoder_of(model):
    return next(m for m in model.modules() if isinstance(m, RoutedLayers))


def masked(model, routers, keep, inputs):
    """By definition: every layer computes all tokens of one text, and who has left is not seen."""
    x_BSD = model.embeddings(input_ids=inputs["input_ids"])
    out = []
    for x_SD, here in zip(x_BSD, inputs["attention_mask"].bool(), strict=True):
        x = x_SD[here]
        alive = torch.ones(len(x), dtype=torch.bool)
        for i, layer in enumerate(model.encoder.layer):
            seen = torch.where(alive, 0.0, -math.inf)[None, None, None].expand(1, 1, len(x), -1)
            got = layer.attention(x[None], seen)[1][0].mean(0)[alive].sum(0)
            x = layer(x[None], seen)[0]
            if str(i) in routers:
                router = routers[str(i)].router
                by = (got,) if isinstance(router, Received) else (x, torch.arange(len(x)))
                score = router(*by)
                score = score.masked_fill(~alive, -math.inf)
                score[0] = math.inf
                best = score.topk(math.ceil(keep * int(alive.sum()))).indices
                alive = torch.zeros_like(alive).index_fill(0, best, True)
        full = x.new_zeros(len(here), x.size(1))
        full[here.nonzero().squeeze(1)] = x * alive[:, None]
        out.append(full)
    return torch.stack(out)


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("keep, router", [(0.3, "linear"), (0.6, "mlp"), (0.5, "attention")])
def test_executed_is_masked(keep, router, left):
    inputs = batch(left=left)
    wrapped = moe_router.wrap(made(), kind="prune", keep=keep, router=router, first=0, every=1)
    dense = made()
    dense.set_attn_implementation("eager")
    with torch.no_grad():
        got = wrapped(**inputs).last_hidden_state
        want = masked(dense, encoder_of(wrapped).depth.prunes, keep, inputs)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    left_early = (got == 0).all(-1) & inputs["attention_mask"].bool()
    assert left_early.sum() >= 8


@pytest.mark.parametrize(
    "kind, config",
    [(BertModel, BertConfig), (RobertaModel, RobertaConfig), (ElectraModel, ElectraConfig)],
    ids=["bert", "roberta", "electra"],
)
def test_keeping_all_is_the_model_itself(kind, config):
    inputs, dense = batch(), made(kind, config)
    with torch.no_grad():
        want = dense(**inputs).last_hidden_state * inputs["attention_mask"][..., None]
        got = moe_router.wrap(dense, kind="prune", keep=1.0)(**inputs)
    torch.testing.assert_close(got.last_hidden_state, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "kind, config",
    [(ViTForImageClassification, ViTConfig), (DeiTForImageClassification, DeiTConfig)],
    ids=["vit", "deit"],
)
def test_patches_of_images_leave(kind, config, tmp_path):
    """16 patches and what stands before them; after two of four layers half of them go."""
    sizes = SIZES | {"image_size": 16, "patch_size": 4, "num_labels": 3}
    torch.manual_seed(0)
    images = torch.randn(2, 3, 16, 16)
    dense = kind(config(**sizes)).eval()
    for keep in (1.0, 0.5):
        model = kind(config(**sizes)).eval()
        model.load_state_dict(dense.state_dict())
        moe_router.wrap(model, kind="prune", keep=keep, first=0, every=1)
        rows = []
        encoder_of(model).register_forward_hook(lambda *args, rows=rows: rows.append(args[2]))
        with torch.no_grad():
            logits, want = model(images).logits, dense(images).logits
        n = rows[0].size(1)
        if keep == 1:
            torch.testing.assert_close(logits, want, rtol=1e-4, atol=1e-5)
            continue
        for _ in range(3):
            n = math.ceil(n / 2)
        assert (rows[0] != 0).any(-1).sum(1).tolist() == [n, n]
        assert not torch.allclose(logits, want, atol=1e-3)
        model.save_pretrained(tmp_path)
        again = load_wrapped(AutoModelForImageClassification, tmp_path)
        with torch.no_grad():
            assert torch.equal(again(images).logits, logits)


@pytest.mark.parametrize("what", ["output_hidden_states", "output_attentions"])
def test_states_of_layers_are_refused(what):
    """Each layer has other tokens."""
    model, inputs = moe_router.wrap(made(), kind="prune"), batch()
    with pytest.raises(ConfigError, match=f"{what}: after wrap each layer has other tokens"):
        model(**inputs, **{what: True})
    model.config.output_hidden_states = True
    with pytest.raises(ConfigError, match="output_hidden_states: after wrap each layer has other"):
        model(**inputs)


def test_padding_and_neighbours_do_not_matter():
    model = moe_router.wrap(made(), kind="prune", keep=0.5)
    inputs = batch()
    with torch.no_grad():
        together = model(**inputs).last_hidden_state
        for i, n in enumerate(LENGTHS):
            alone = model(input_ids=inputs["input_ids"][i : i + 1, :n]).last_hidden_state
            torch.testing.assert_close(together[i : i + 1, :n], alone, rtol=1e-4, atol=1e-5)


def test_the_ledger_counts_what_ran():
    """Layers 0 and 1 see n tokens, 2 and 3 half of them; padding none."""
    model = moe_router.wrap(made(), kind="prune", keep=0.5)
    ledger = Ledger()
    set_context(model, Context(ledger=ledger))
    with torch.no_grad():
        model(**batch((8, 8), 12))
    ran, dense = ledger.by_op()["blocks"]
    linear, scores = 2 * (4 * 32 * 32 + 2 * 32 * 48), 4 * 32

    def layer(n):
        return 2 * (n * linear + n * n * scores)

    assert dense == 4 * layer(8) and ran == 2 * layer(8) + 2 * layer(4)


def test_what_cannot_be_wrapped_says_why(tmp_path):
    for wrong, message in (
        ({"kind": "leap"}, "kind=leap: want prune, skip, halt, merge"),
        ({"kind": "prune", "budget": 0.5}, "budget: kind=prune wants every, first"),
        ({"kind": "prune", "first": 3}, "first=3: want at most 2"),
        ({"kind": "skip"}, "BertModel: kind=skip wants Llama, Mistral, Qwen2 or Qwen3"),
    ):
        with pytest.raises(ConfigError, match=message):
            moe_router.wrap(made(), **wrong)
    with pytest.raises(
        ConfigError, match=r"GPT2LMHeadModel: kind=prune wants BERT.*; its layers are not"
    ):
        moe_router.wrap(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1)), kind="prune")
    other = made(MPNetModel, MPNetConfig)
    with pytest.raises(ConfigError, match="MPNetModel: its attention is not exchangeable"):
        moe_router.wrap(other, kind="prune")
    assert not any(isinstance(module, RoutedLayers) for module in other.modules())
    with pytest.raises(ConfigError, match="BertModel: is wrapped already; load_wrapped"):
        moe_router.wrap(moe_router.wrap(made(), kind="prune"), kind="prune")
    made().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="want a model saved after wrap"):
        load_wrapped(BertModel, tmp_path)
