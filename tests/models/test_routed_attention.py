"""Models whose attention is routed: one model, two paths, the same numbers."""

import logging

import pytest
import torch

from moe_router import Context, Ledger
from moe_router.config import AttentionConfig, RoutingConfig
from moe_router.models import KVCache, attend_routed
from moe_router.models.attend_routed import RoutedAttention, pairs_of
from moe_router.models.packing import Packing
from moe_router.routing.blocks import Blocks
from tests.models.attention_checks import (
    LENGTHS,
    VOCAB,
    check_causality,
    check_each_sequence_alone,
    check_leaving_and_joining,
    check_prefill_then_decode,
    logits,
)
from tests.models.helpers import packed, small_model

HOW = {"block": 4, "top_k": 3, "window": 4}
VARIANTS = {
    "routed": {},
    "gated": {"gated": True},
    "no window": {"window": 0},
    "last dense": {"dense_last": 1},
    "tree": {"branch": 2, "gated": True},
    "position": {"router": "position"},
    "random": {"router": "random"},
}


def model_with(attention=None, **model):
    how = AttentionConfig(kind="routed", **HOW | (attention or {}))
    return small_model(attention=how, vocab=VOCAB, **model).eval()


def masked(monkeypatch):
    """Attention of all pairs under a mask, in the place of the chosen pairs alone."""
    attend = attend_routed.attend_blocks

    def plain(*tensors, kernels, **how):
        return attend(*tensors, kernels="reference", **how)

    monkeypatch.setattr(attend_routed, "attend_blocks", plain)


@pytest.mark.parametrize("name", VARIANTS)
def test_executed_equals_masked_in_values_and_gradients(name, monkeypatch):
    model, batch = model_with(VARIANTS[name]), packed(LENGTHS, vocab=VOCAB)
    weight = torch.randn(sum(LENGTHS), VOCAB)
    results = []
    for _ in range(2):
        model.zero_grad()
        out = model(*batch).logits_TV
        (out * weight).sum().backward()
        results.append([out.detach(), *(p.grad.clone() for p in model.parameters())])
        masked(monkeypatch)
    for ours, wanted in zip(*results, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("name", VARIANTS)
def test_batch_composition_does_not_matter(name):
    check_each_sequence_alone(model_with(VARIANTS[name]))


@pytest.mark.parametrize("name", VARIANTS)
def test_a_later_token_changes_nothing_before_it(name):
    check_causality(model_with(VARIANTS[name]))


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(
    "prompts, page", [([0] * 5, 64), ([36, 1, 0, 5, 8], 4), ([13, 0, 0, 22, 4], 2)]
)
def test_prefill_then_decode_is_one_pass(name, prompts, page):
    check_prefill_then_decode(model_with(VARIANTS[name]), prompts, page)


def test_sequences_leave_and_join_the_cache():
    check_leaving_and_joining(model_with({"gated": True}))


def test_an_encoder_attends_to_both_sides(monkeypatch):
    how = AttentionConfig(kind="routed", block=4, top_k=4, window=4)
    model = small_model(attention=how, vocab=VOCAB, classes=3).eval()
    batch = packed([37, 1, 22], vocab=VOCAB)
    ours = logits(model, *batch)
    late = batch[0].clone()
    late[36] = late[0]
    assert not torch.allclose(logits(model, late, *batch[1:])[0], ours[0])
    masked(monkeypatch)
    torch.testing.assert_close(logits(model, *batch), ours, rtol=1e-4, atol=1e-4)


def test_tokens_that_leave_make_other_blocks():
    routing = RoutingConfig(kind="prune", keep=0.5, first=0)
    how = AttentionConfig(kind="routed", block=4, top_k=3, window=0)
    model = small_model(attention=how, routing=routing, vocab=VOCAB, classes=3).eval()
    ids, position, offsets = packed(LENGTHS[:2], vocab=VOCAB)
    together = logits(model, ids, position, offsets)
    alone = logits(model, ids[:37], position[:37], offsets[:2])
    torch.testing.assert_close(together[:1], alone, rtol=1e-4, atol=1e-4)


def test_short_texts_are_dense_and_the_log_says_so_once(caplog):
    attend_routed._say_dense.cache_clear()
    dense, batch = small_model(vocab=VOCAB).eval(), packed([12, 7], vocab=VOCAB)
    with caplog.at_level(logging.INFO, "moe_router.models.attend_routed"):
        ours = logits(model_with(), *batch)
    assert torch.equal(ours, logits(dense, *batch))
    assert [r.getMessage() for r in caplog.records] == [
        "model.attention.top_k=3 blocks of 4 tokens hold a whole text: its attention is dense"
    ]


def test_the_ledger_counts_the_pairs_that_were_computed():
    model, (ids, position, offsets) = model_with({"dense_last": 1}), packed(LENGTHS, vocab=VOCAB)
    ledger = Ledger()
    logits(model, ids, position, offsets, context=Context(ledger=ledger))
    executed, dense = ledger.by_op()["attention"]
    T, D, dense_pairs = sum(LENGTHS), 16, sum(n * (n + 1) // 2 for n in LENGTHS)
    project = T * 2 * (2 * D * D + 2 * D * 8)
    assert dense == 3 * (project + 4 * D * dense_pairs)
    pairs = sum(min(4 * (t // 4), 8) + t % 4 + 1 for n in LENGTHS for t in range(n))
    blocks = sum(-(-n // 4) for n in LENGTHS)
    choosing = 2 * blocks * blocks * 2 * 4
    assert executed == dense - 2 * 4 * D * (dense_pairs - pairs) + 2 * choosing
    both = [Ledger(), Ledger()]
    logits(model, ids, position, offsets, cache=KVCache(3, 5), context=Context(ledger=both[0]))
    cache = KVCache(3, 1)
    for t in range(37):
        one = (ids[t : t + 1], position[t : t + 1], torch.tensor([0, 1]))
        logits(model, *one, cache=cache, context=Context(ledger=both[1]))
    assert both[0].by_op() == ledger.by_op()
    alone = Ledger()
    logits(model, ids[:37], position[:37], offsets[:2], context=Context(ledger=alone))
    routed_pairs = [of.by_op()["attention"][0] for of in (alone, both[1])]
    # decoding scores no block against later ones
    assert 0 <= routed_pairs[0] - routed_pairs[1] <= 2 * 2 * 10 * 10 * 2 * 4


def test_pairs_of_an_encoder_are_whole_blocks():
    blocks = Blocks.of([6, 3], 4, torch.device("cpu"), causal=False)
    target = torch.tensor([[[0, 1]], [[1, -1]], [[2, -1]]])
    assert int(pairs_of(target, blocks)) == 4 * 6 + 2 * 2 + 3 * 3


def test_training_comes_down_from_dense():
    how = AttentionConfig(kind="routed", block=4, top_k=2, window=0, curriculum=10)
    routed, packing = RoutedAttention(how), Packing(torch.tensor([0, 40]), torch.device("cpu"))
    x = [torch.randn(40, heads, 8) for heads in (4, 2, 2)]
    assert routed(*x, packing, 0).target_NJK is None  # dense
    assert routed(*x, packing, 5).target_NJK.shape[2] == 6
    pairs = [int(routed(*x, packing, step).executed.pairs()) for step in (0, 5, 10)]
    assert pairs[0] == 820 > pairs[1] > pairs[2] == int(routed(*x, packing).executed.pairs())
    model = model_with({"top_k": 2, "window": 0, "curriculum": 10}).train()
    batch = packed([40], vocab=VOCAB)
    out = [model(*batch, context=Context(step=step)).logits_TV for step in (0, 10, None)]
    assert torch.equal(out[1], out[2]) and not torch.allclose(out[0], out[2])
    assert torch.equal(model.eval()(*batch, context=Context(step=0)).logits_TV, out[2])


def test_the_dense_start_of_the_curriculum_is_dense_attention():
    model = model_with({"curriculum": 10}).train()
    dense, batch = small_model(vocab=VOCAB).train(), packed([40, 22], vocab=VOCAB)
    start = model(*batch, context=Context(step=0)).logits_TV
    torch.testing.assert_close(start, dense(*batch).logits_TV, rtol=1e-4, atol=1e-4)


def test_recomputed_blocks_choose_alike():
    batch, grads = packed(LENGTHS, vocab=VOCAB), []
    for recompute in (False, True):
        model = model_with({"gated": True}, recompute=recompute).train()
        model(*batch).logits_TV.square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)
