"""Packed rows know padding and nothing else of a mask: whatever else one says is refused, never
left out. So is an attention that does not know of packed rows."""

import pytest
import torch
from transformers import BertModel, LlamaModel

import moe_router
from moe_router.errors import ConfigError
from tests.integrations import test_wrap, test_wrap_decoder, test_wrap_halt

MADE = {
    "skip": test_wrap_decoder.wrapped,
    "halt a decoder": lambda: test_wrap_halt.decoder("tsa"),
    "prune": lambda: moe_router.wrap(test_wrap.made(BertModel), kind="prune"),
    "halt": lambda: moe_router.wrap(test_wrap.made(BertModel), kind="halt"),
    "merge": lambda: moe_router.wrap(test_wrap.made(BertModel), kind="merge", keep=0.7),
}
S = 9
IDS = torch.randint(2, 40, (1, S), generator=torch.Generator().manual_seed(0))
DOCUMENT = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1])
CAUSAL = torch.ones(S, S, dtype=torch.bool).tril()


def is_causal(model):
    return isinstance(model.base_model, LlamaModel)


def refused(model, **inputs):
    with torch.no_grad(), pytest.raises(ConfigError, match="attention_mask: after wrap it tells"):
        model(IDS, **inputs)


@pytest.mark.parametrize("kind", MADE)
def test_a_mask_that_hides_more_than_padding_is_refused(kind):
    model = MADE[kind]()
    apart = DOCUMENT[:, None] == DOCUMENT
    refused(model, attention_mask=(CAUSAL & apart)[None, None])
    refused(model, attention_mask=(CAUSAL | is_causal(model))[None, None])  # the other way
    refused(model, attention_mask=torch.zeros(1, 1, S, S))  # to be added to scores


@pytest.mark.parametrize("kind", MADE)
def test_a_mask_of_four_dimensions_that_tells_padding_is_taken(kind):
    model = MADE[kind]()
    here = torch.tensor([[False] * 3 + [True] * 6])
    seen = here[:, None, None] & (CAUSAL if is_causal(model) else True)
    with torch.no_grad():
        one, other = (
            model(IDS, attention_mask=mask, position_ids=torch.arange(S)[None])[0]
            for mask in (here.long(), seen.expand(1, 1, S, S))
        )
    assert torch.equal(one[here], other[here])


@pytest.mark.parametrize("kind", ["skip", "halt a decoder"])
def test_texts_side_by_side_in_a_row_are_refused(kind):
    """transformers hides them from each other where positions begin again."""
    at = torch.cat([torch.arange(4), torch.arange(5)])[None]
    refused(MADE[kind](), position_ids=at, use_cache=False)


@pytest.mark.parametrize("kind", MADE)
def test_another_attention_is_refused(kind):
    model = MADE[kind]()
    with torch.no_grad():
        want = model(IDS)[0]
        for name in ("eager", "sdpa"):
            model.set_attn_implementation(name)
            with pytest.raises(ConfigError, match=f"attn_implementation={name}: a wrapped model"):
                model(IDS)
        model.set_attn_implementation("moe_router_packed")
        assert torch.equal(model(IDS)[0], want)
