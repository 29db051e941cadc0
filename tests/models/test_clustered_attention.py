"""Models whose attention runs in clusters of tokens: one model, two paths, the same numbers."""

import pytest
import torch

from moe_router import Context, Ledger
from moe_router.config import AttentionConfig, RoutingConfig
from moe_router.errors import ConfigError
from moe_router.models import KVCache
from moe_router.types import NoiseKey
from moe_router_kernels.reference_attention import cluster_mask
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

HOW = {"select": "clusters", "block": 4, "clusters": 3, "window": 3, "global_tokens": 2}
VARIANTS = {
    "clusters": {},
    "gated": {"gated": True},
    "alone": {"window": 0, "global_tokens": 0},
    "last dense": {"dense_last": 1},
    "position": {"router": "position"},
    "random": {"router": "random"},
}


def model_with(attention=None, **model):
    how = AttentionConfig(kind="routed", **HOW | {"router": "linear"} | (attention or {}))
    return small_model(attention=how, vocab=VOCAB, **model).eval()


def clustered(model):
    return [b.attention.routed for b in model.blocks if b.attention.routed is not None]


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("training", [False, True])
def test_executed_equals_masked_in_values_and_gradients(name, training):
    model, batch = model_with(VARIANTS[name]).train(training), packed(LENGTHS, vocab=VOCAB)
    weight, context = torch.randn(sum(LENGTHS), VOCAB), Context(key=NoiseKey(1, 2, 3), step=5)
    results = []
    for kernels in ("auto", "reference"):
        for routed in clustered(model):
            routed.kernels = kernels
        model.zero_grad()
        out = model(*batch, context=context)
        ((out.logits_TV * weight).sum() + model.aux_loss(out)).backward()
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        results.append([out.logits_TV.detach(), *grads])
    for ours, wanted in zip(*results, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("name", VARIANTS)
def test_batch_composition_does_not_matter(name):
    check_each_sequence_alone(model_with(VARIANTS[name]))


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("training", [False, True])
def test_a_later_token_changes_nothing_before_it(name, training):
    check_causality(model_with(VARIANTS[name]).train(training))


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("prompts, page", [([0] * 5, 64), ([36, 1, 0, 5, 8], 4)])
def test_prefill_then_decode_is_one_pass(name, prompts, page):
    check_prefill_then_decode(model_with(VARIANTS[name]), prompts, page)


def test_sequences_leave_and_join_the_cache():
    check_leaving_and_joining(model_with({"gated": True}))


def test_the_ledger_counts_the_pairs_of_the_mask():
    model, (ids, position, offsets) = model_with(), packed(LENGTHS, vocab=VOCAB)
    chosen = {}
    for layer, routed in enumerate(clustered(model)):
        keep = lambda _, __, out, layer=layer: chosen.update({layer: out.cluster_TJ})  # noqa: E731
        routed.router.register_forward_hook(keep)
    ledger = Ledger()
    logits(model, ids, position, offsets, context=Context(ledger=ledger))
    executed, _ = ledger.by_op()["attention"]
    T, D, J, C = sum(LENGTHS), 16, 2, 3
    masks = [cluster_mask(offsets, c_T, 3, 2) for at in range(3) for c_T in chosen[at].T]
    pairs = sum(int(sum(masks[2 * at : 2 * at + 2]).sum()) // J for at in range(3))
    assert executed == 3 * T * (2 * (2 * D * D + 2 * D * 8) + 2 * D * J * C) + 4 * D * pairs
    both = Ledger()
    logits(model, ids, position, offsets, cache=KVCache(3, 5), context=Context(ledger=both))
    assert both.by_op() == ledger.by_op()
    stepped, cache = Ledger(), KVCache(3, 1)
    for t in range(37):
        one = (ids[t : t + 1], position[t : t + 1], torch.tensor([0, 1]))
        logits(model, *one, cache=cache, context=Context(ledger=stepped))
    alone = Ledger()
    logits(model, ids[:37], position[:37], offsets[:2], context=Context(ledger=alone))
    # halves of pairs, mean over two heads, are rounded down once a pass
    assert 0 <= alone.by_op()["attention"][0] - stepped.by_op()["attention"][0] <= 37 * 3 * 4 * D


def test_the_choice_learns_by_what_is_attended_to():
    model, batch = model_with({"balance_loss": 0.0}).train(), packed(LENGTHS, vocab=VOCAB)
    out = model(*batch, context=Context(step=0)).logits_TV
    weights = [routed.router.score.weight for routed in clustered(model)]
    grads = torch.autograd.grad(out.square().sum(), weights)
    assert all(g.norm() > 0 for g in grads)
    hard = model.eval()(*batch).logits_TV
    tokens = (torch.randn(5, 16), torch.arange(5), torch.tensor([0, 5]), Context())
    for routed in clustered(model):  # straight through: the weight is 1, not p
        assert torch.equal(routed.router.train()(*tokens).weight_TJ, torch.ones(5, 2))
    soft = model_with({"gated": True})(*batch).logits_TV
    assert not torch.allclose(hard, soft)


def test_noise_is_of_training_and_named_by_step():
    model, batch = model_with().train(), packed(LENGTHS, vocab=VOCAB)
    keys = [NoiseKey(0, 1), NoiseKey(0, 1), NoiseKey(0, 2)]
    runs = [logits(model, *batch, context=Context(key=key, step=9)) for key in keys]
    assert torch.equal(runs[0], runs[1]) and not torch.allclose(runs[0], runs[2])
    plain = model_with({"noise": 0.0}).train()
    assert torch.equal(logits(plain, *batch), logits(plain.eval(), *batch))


def test_balance_is_1_where_clusters_are_equal_and_c_where_one_has_all():
    router = clustered(model_with())[0].router.train()
    offsets, p = torch.tensor([0, 4, 10]), torch.full((10, 2, 3), 1 / 3)
    even = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2, 0])[:, None].expand(-1, 2)
    assert router._balance(p, even, offsets, Context()) == pytest.approx(1)
    one = torch.zeros(10, 2, dtype=torch.int32)
    all_in_one = torch.nn.functional.one_hot(one.long(), 3).float()
    assert router._balance(all_in_one, one, offsets, Context()) == pytest.approx(3)
    model, batch = model_with().train(), packed(LENGTHS, vocab=VOCAB)
    out = model(*batch, context=Context(step=0))
    losses = [losses["cluster_balance"] for losses in out.depth]
    assert len(losses) == 3 and all(0.9 < loss < 3 for loss in losses)
    assert float(model.aux_loss(out).detach()) == pytest.approx(0.01 * float(sum(losses).detach()))


def test_ranks_choose_as_one_does_and_their_losses_sum_to_its():
    router = clustered(model_with())[0].router.train()
    x, place, offsets = torch.randn(10, 16), torch.arange(10), torch.tensor([0, 3, 4, 10])
    whole = router(x, place, offsets, Context(key=NoiseKey(1, 2, 7)))
    router.total = lambda _: torch.tensor(3.0)
    parts = [
        router(x[:4], place[:4], torch.tensor([0, 3, 4]), Context(key=NoiseKey(1, 2, 7))),
        router(x[4:], place[4:], torch.tensor([0, 6]), Context(key=NoiseKey(1, 2, 11))),
    ]
    assert torch.equal(torch.cat([part.cluster_TJ for part in parts]), whole.cluster_TJ)
    losses = [part.losses["cluster_balance"] for part in parts]
    torch.testing.assert_close(sum(losses), whole.losses["cluster_balance"])


def test_training_comes_down_from_one_cluster():
    model, batch = model_with({"curriculum": 9}).train(), packed(LENGTHS, vocab=VOCAB)
    config = clustered(model)[0].config
    assert [config.open_clusters(step) for step in (0, 3, 6, 8, 9, None)] == [1, 1, 2, 2, 3, 3]
    dense = small_model(vocab=VOCAB).train()(*batch).logits_TV
    start = model(*batch, context=Context(step=0)).logits_TV
    torch.testing.assert_close(start, dense, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(model(*batch, context=Context(step=9)).logits_TV, dense)


def test_recomputed_blocks_choose_alike():
    batch, grads = packed(LENGTHS, vocab=VOCAB), []
    for recompute in (False, True):
        model = model_with(recompute=recompute).train()
        out = model(*batch, context=Context(key=NoiseKey(1, 2), step=1))
        (out.logits_TV.square().sum() + model.aux_loss(out)).backward()
        grads.append([p.grad for p in model.parameters()])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def test_tokens_that_skip_a_block_are_not_in_its_clusters():
    routing = RoutingConfig(kind="skip", keep=0.5, every=1, first=0)
    model = model_with({"noise": 0.0}, routing=routing)
    ids, position, offsets = packed(LENGTHS[:2], vocab=VOCAB)
    together = logits(model, ids, position, offsets)
    alone = logits(model, ids[:37], position[:37], offsets[:2])
    torch.testing.assert_close(together[:37], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "how, message",
    [
        ({"router": "keys"}, r"attention\.router=keys: want linear, position or random"),
        ({"branch": 4}, r"attention\.branch=4: want 0, or model\.attention\.select=blocks"),
        ({"clusters": 0}, r"attention\.clusters=0: want at least 1"),
        ({"temperature": 0.0}, r"attention\.temperature=0\.0: want above 0"),
        ({"select": "blocks"}, r"attention\.router=linear: want keys, position or random, or"),
    ],
)
def test_what_clusters_cannot_be(how, message):
    with pytest.raises(ConfigError, match=message):
        AttentionConfig(kind="routed", **HOW | {"router": "linear"} | how)


def test_clusters_are_causal_and_their_noise_names_tokens_by_place():
    with pytest.raises(ConfigError, match=r"attention\.select=clusters: want blocks, or model\.ki"):
        model_with(classes=3)
    routing = RoutingConfig(kind="skip", keep=0.5, every=1, first=0)
    with pytest.raises(ConfigError, match=r"attention\.noise=1\.0: want 0 beside model\.routing"):
        model_with(routing=routing)
