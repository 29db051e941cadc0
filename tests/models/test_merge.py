"""Merging inside the classifiers: executed equals its definition, one sequence after another."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_router import Context, Ledger
from moe_router.config import ImageConfig, ModelConfig, RoutingConfig
from moe_router.errors import ConfigError
from moe_router.layers.merge import kept_of, unmerge
from moe_router.models import ImageClassifier, init_parameters
from moe_router.models.rope import rotate
from moe_router.types import Tokens
from tests.layers.test_merge import who_joins
from tests.models.helpers import packed, small_model
from tests.models.oracle import norm, turn_of

LENGTHS = [5, 1, 9, 3, 12]
MERGE = {"kind": "merge", "keep": 0.6, "every": 1, "first": 0}
KINDS = {
    "merge": MERGE,
    "half": MERGE | {"keep": 0.5},
    "every second": MERGE | {"every": 2, "first": 1},
    "at the end": MERGE | {"first": 3},
}
MOE = {"dense": None, "moe": {"shared_hidden": 4}}


def classifier(kind="merge", moe="dense", **more):
    routing = RoutingConfig(**KINDS[kind])
    return small_model(MOE[moe], routing=routing, layers=4, classes=3, **more)


def attended(layer, x_SD, turn, size_S):
    """What attention adds, by loops over heads; the mean key of each token, as queries see it."""
    q, k, v = (f(x_SD).unflatten(-1, (-1, layer.channels)) for f in (layer.q, layer.k, layer.v))
    qs, ks = rotate(q, turn), rotate(k, turn)
    heads = []
    for h in range(q.size(1)):
        j = h // (q.size(1) // k.size(1))
        score_SS = qs[:, h] @ ks[:, j].T * layer.channels**-0.5 + size_S.log()
        heads.append(score_SS.softmax(-1) @ v[:, j])
    return layer.o(torch.cat(heads, -1)), ks.mean(1)


def merged_logits(model, in_S):
    """(C,) logits of one sequence, tokens that each block attended and fed, and their slots."""
    keep, S = model.config.routing.keep, len(in_S)
    position_S = torch.arange(S, dtype=torch.int32)
    x_SD, size_S, slot_S = model.embed(in_S), torch.ones(S).double(), torch.arange(S)
    attend, fed = [], []
    for block in model.blocks:
        attend.append(len(x_SD))
        turn = turn_of(model, position_S)
        delta_SD, key_SC = attended(block.attention, norm(block.attention_norm, x_SD), turn, size_S)
        x_SD = x_SD + delta_SD
        if block.merge is not None:
            joins = who_joins(key_SC, len(x_SD) - kept_of(len(x_SD), keep))
            stay = [t for t in range(len(x_SD)) if t not in joins]
            at = {t: m for m, t in enumerate(stay)} | {
                t: stay.index(partner) for t, partner in joins.items()
            }
            share_MS = torch.zeros(len(stay), len(x_SD)).double()
            for t, m in at.items():
                share_MS[m, t] = size_S[t]
            size_S = share_MS.sum(1)
            x_SD, position_S = share_MS @ x_SD / size_S[:, None], position_S[stay]
            slot_S = torch.tensor([at[int(t)] for t in slot_S])
        normed = norm(block.mlp_norm, x_SD)
        fed.append(len(x_SD))
        if block.moe is None:
            x_SD = x_SD + block.mlp(normed)
        else:
            bounds = torch.tensor([0, len(x_SD)], dtype=torch.int32)
            x_SD = x_SD + block.moe(Tokens(normed, position_S, bounds)).delta_TD
    pooled_D = size_S @ norm(model.norm, x_SD) / size_S.sum()
    return model.head(pooled_D), attend, fed, slot_S


def compare(model, batch, row):
    """Executed and defined: logits, FLOPs, slots, gradients."""
    ledger = Ledger()
    output = model(*batch, context=Context(ledger=ledger))
    parts = [merged_logits(model, batch[0][a:b]) for a, b in pairwise(batch[2].tolist())]
    wanted_BC = torch.stack([part[0] for part in parts]).float()
    torch.testing.assert_close(output.logits_BC, wanted_BC, rtol=1e-5, atol=1e-6)
    if model.config.moe is None:
        fed, all_of = sum(sum(part[2]) for part in parts), model.config.layers * len(batch[0])
        assert fed < all_of
        assert ledger.by_op()["mlp"] == (fed * row, all_of * row)
    first = 0
    for b, part in enumerate(parts):  # rows of the last block, by sequence
        a, z = batch[2][b], batch[2][b + 1]
        assert torch.equal(output.slot_T[a:z], part[3] + first)
        first += part[2][-1]
    probe_BC = torch.randn(wanted_BC.shape, generator=torch.Generator().manual_seed(1))
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    ours, theirs = (
        torch.autograd.grad((out * probe_BC).sum(), [p for _, p in named], allow_unused=True)
        for out in (output.logits_BC, wanted_BC)
    )
    for (name, _), a, b in zip(named, ours, theirs, strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("moe", MOE)
@pytest.mark.parametrize("kind", KINDS)
def test_executed_equals_the_definition_forward_and_backward(kind, moe):
    compare(classifier(kind, moe).double(), packed(LENGTHS), row=6 * 16 * 24)


def test_and_so_it_does_for_images():
    image = ImageConfig(size=8, channels=1, patch=2)
    sizes = {"layers": 3, "dim": 16, "heads": 4, "kv_heads": 2, "hidden": 24, "rope_theta": 10.0}
    model = ImageClassifier(
        ModelConfig(kind="vit", **sizes, routing=RoutingConfig(**MERGE)), image, classes=3
    )
    init_parameters(model, seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter *= 8.0
    model.embed.normalise_by((120.0,), (60.0,))
    generator = torch.Generator().manual_seed(0)
    patch_TP = torch.randint(0, 256, (3 * 16, 4), generator=generator).to(torch.uint8)
    position_T = torch.arange(16, dtype=torch.int32).repeat(3)
    offsets_B1 = torch.arange(0, 49, 16).int()
    compare(model.double(), (patch_TP, position_T, offsets_B1), row=6 * 16 * 24)


@pytest.mark.parametrize("moe", MOE)
def test_batch_composition_does_not_matter(moe):
    for training in (True, False):
        model = classifier("merge", moe).double().train(training)
        ids_T, position_T, offsets_B1 = packed(LENGTHS)
        together = model(ids_T, position_T, offsets_B1).logits_BC
        for b, (a, z) in enumerate(pairwise(offsets_B1.tolist())):
            (alone_C,) = model(ids_T[a:z], position_T[a:z], torch.tensor([0, z - a])).logits_BC
            torch.testing.assert_close(together[b], alone_C, rtol=1e-5, atol=1e-6)


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(0, 14), min_size=1, max_size=5), st.sampled_from(sorted(KINDS)))
def test_any_lengths(lengths, kind):
    model = classifier(kind).double()
    output = model(*packed(lengths))
    assert output.logits_BC.shape == (len(lengths), 3) and output.logits_BC.isfinite().all()
    output.logits_BC.sum().backward()


@pytest.mark.parametrize("moe", MOE)
def test_activation_checkpointing_changes_no_gradient_and_counts_nothing_twice(moe):
    seen = []
    for recompute in (False, True):
        model, ledger = classifier("merge", moe, recompute=recompute), Ledger()
        output = model(*packed(LENGTHS), context=Context(ledger=ledger))
        (output.logits_BC.square().sum() + model.aux_loss(output)).backward()
        seen.append(([p.grad for p in model.parameters()], ledger.by_op()))
    (grads, flops), (again, flops_again) = seen
    assert flops == flops_again
    for kept, other in zip(grads, again, strict=True):
        assert (kept is None and other is None) or torch.equal(kept, other)


def test_choices_of_experts_are_observed_by_token():
    observed = []
    model = classifier("merge", "moe")
    output = model(
        *packed(LENGTHS),
        context=Context(observe=lambda layer, choice, plan: observed.append(choice.target_TK)),
    )
    sizes = [int((target_TK[:, 0] >= 0).sum()) for target_TK in observed]
    assert len(sizes) == 4 and all(len(target_TK) == sum(LENGTHS) for target_TK in observed)
    assert sizes == sorted(sizes, reverse=True) and sizes[0] < sum(LENGTHS)
    assert sizes[-1] == int(output.slot_T.max()) + 1
    rows_MD = torch.randn(sizes[-1], 2)
    assert torch.equal(unmerge(rows_MD, output.slot_T)[0], rows_MD[0])


def test_keeping_all_is_the_model_without():
    model, dense = classifier().double(), small_model(None, layers=4, classes=3).double()
    all_kept = small_model(
        None, routing=RoutingConfig(**MERGE | {"keep": 1.0}), layers=4, classes=3
    ).double()
    batch = packed(LENGTHS)
    torch.testing.assert_close(all_kept(*batch).logits_BC, dense(*batch).logits_BC)
    assert (model(*batch).logits_BC - dense(*batch).logits_BC).abs().max() > 1e-4


def test_a_causal_lm_does_not_merge():
    with pytest.raises(ConfigError, match=r"routing\.kind=merge: want skip, halt or leap"):
        small_model(None, routing=RoutingConfig(kind="merge", keep=0.5))
