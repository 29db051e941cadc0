"""Wrapped models at the edges: padding alone, fp64, and models that cannot be wrapped."""

import pytest
import torch
from transformers import BertConfig, BertLMHeadModel, BertModel, EncoderDecoderModel

import moe_router
from moe_router.errors import ConfigError
from moe_router.integrations.wrap import load_wrapped
from tests.integrations import test_wrap, test_wrap_decoder
from tests.integrations.test_wrap_masks import IDS, MADE, S


@pytest.mark.parametrize("kind", MADE)
def test_a_batch_of_padding_alone_computes_nothing(kind):
    model = MADE[kind]()
    with torch.no_grad():
        out = model(IDS.expand(2, S), attention_mask=torch.zeros(2, S, dtype=torch.long))[0]
    assert out.shape[:2] == (2, S) and out.isfinite().all()


@pytest.mark.parametrize("kind", MADE)
def test_a_model_in_fp64_has_routers_in_fp32(kind, tmp_path):
    model = MADE[kind]()
    model.save_pretrained(tmp_path)
    other = load_wrapped(type(model), tmp_path, dtype=torch.float64)
    with torch.no_grad():
        one, two = model(IDS)[0], other(IDS)[0]
    assert two.dtype == torch.float64
    torch.testing.assert_close(two.float(), one, rtol=1e-4, atol=1e-4)


def test_a_model_over_several_devices_is_refused():
    """Its layers have hooks, which would call them as they were: nothing would be routed."""
    accelerate = pytest.importorskip("accelerate")
    for kind, made in (("skip", test_wrap_decoder.made), ("prune", test_wrap.made)):
        model = accelerate.cpu_offload(made(), torch.device("cpu"))
        with pytest.raises(ConfigError, match="device_map has it on several devices, or on disk"):
            moe_router.wrap(model, kind=kind)


def test_what_is_no_model_of_one_stack_says_so():
    bert = test_wrap.made(BertModel)
    decoder = BertLMHeadModel(
        BertConfig(**test_wrap.SIZES, is_decoder=True, add_cross_attention=True)
    )
    for model, message in (
        (torch.nn.Linear(2, 2), "wrap: Linear: want a model of transformers itself"),
        (torch.nn.DataParallel(bert), "wrap: DataParallel: want a model of transformers itself"),
        (EncoderDecoderModel(encoder=bert, decoder=decoder), "its layers are not known here"),
    ):
        with pytest.raises(ConfigError, match=message):
            moe_router.wrap(model, kind="prune")


def test_values_of_another_type_are_one_line():
    for wrong, message in (
        ({"keep": "half"}, "model.routing.keep='half': want a finite number"),
        ({"every": 2.0}, r"model.routing.every=2.0: want a whole number; write 2"),
        ({"router": "liner"}, "model.routing.router='liner': want linear | mlp | position"),
    ):
        with pytest.raises(ConfigError, match=message):
            moe_router.wrap(test_wrap.made(), kind="prune", **wrong)
    with pytest.raises(ConfigError, match="first=1: kind=prune wants more layers than 1"):
        moe_router.wrap(test_wrap.made(num_hidden_layers=1), kind="prune")
