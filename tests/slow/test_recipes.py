"""docs/recipes.md, run as it stands on tiny checkpoints made here."""

import re
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)
from typer.testing import CliRunner

from moe_router.cli import app
from moe_router.integrations.wrap import load_wrapped

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]
PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def recipe(number):
    """Its names after it ran, line by line as a reader would copy it."""
    part = re.split(r"^## ", PAGE.read_text(), flags=re.M)[number]
    names = {}
    for language, text in re.findall(r"^```(\w+)\n(.*?)^```", part, re.M | re.S):
        if language == "python":
            exec(compile(text, str(PAGE), "exec"), names)
        else:
            for line in text.splitlines():
                done = CliRunner().invoke(app, line.split()[1:])
                assert line.startswith("moe-router ") and done.exit_code == 0, done.output
    return names


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


def test_experts_of_a_mixtral(here):
    config = MixtralConfig(vocab_size=64, num_local_experts=4, **SIZES)
    MixtralForCausalLM(config).save_pretrained("mixtral")
    names = recipe(1)
    model, eager = names["model"], AutoModelForCausalLM.from_pretrained("mixtral")
    assert model.config._experts_implementation == "moe_router"
    wanted = eager.generate(names["ids"], max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(names["text"], wanted)
    assert all(p.grad is not None for p in model.parameters())


def test_a_llama_becomes_a_mixture(here):
    LlamaForCausalLM(LlamaConfig(vocab_size=257, **SIZES)).save_pretrained("llama")
    losses = recipe(2)["losses"]
    assert losses[-1] < losses[0] - 0.1
    model = AutoModelForCausalLM.from_pretrained("experts")
    assert isinstance(model, MixtralForCausalLM) and model.config.num_local_experts == 8


def test_a_bert_drops_tokens(here):
    sizes = {name: size for name, size in SIZES.items() if "key_value" not in name}
    BertModel(BertConfig(vocab_size=100, **sizes | {"num_hidden_layers": 3})).save_pretrained(
        "bert"
    )
    student = recipe(3)["student"].eval()
    again = load_wrapped(AutoModel, "pruned").eval()
    ids = torch.randint(5, 100, (4, 24))
    with torch.no_grad():
        out = student(ids).last_hidden_state
        assert torch.equal(again(ids).last_hidden_state, out)
    assert ((out == 0).all(-1).sum(1) == 12).all()
