"""Routing in depth inside the causal LM: executed equals masked, prefill equals decode."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_router import Context, Ledger
from moe_router.config import RoutingConfig
from moe_router.errors import ConfigError, NotCausalError
from moe_router.models import KVCache, Sampling, generate, token_loss
from tests.models.helpers import VOCAB, packed, small_model
from tests.models.oracle import halt_logits, skip_logits

LENGTHS = [5, 1, 9, 3]
SKIP = {"kind": "skip", "keep": 0.5, "every": 2, "first": 1}
HALT = {"kind": "halt", "start": -0.5, "every": 1, "first": 0}
LEAP = {"kind": "leap", "start": 0.3, "every": 1, "first": 0}
MLP = {"router": "mlp", "router_hidden": 8}
# one block run up to four times, or two run twice
LOOPS = {
    "halt_loops": {"layers": 1, "loops": 4},
    "tsa_loops": {"layers": 2, "loops": 2},
    "skip_loops": {"layers": 2, "loops": 2},
}
VARIANTS = {
    "skip": (SKIP, None),
    "skip_all_blocks": (SKIP | {"every": 1, "first": 0, "keep": 0.3}, None),
    "skip_mlp_predictor": (SKIP | {"predictor": "mlp", "router": "mlp", "router_hidden": 8}, None),
    "skip_moe": (SKIP | {"keep": 0.6}, {"shared_hidden": 4}),
    "halt": (HALT, None),
    "halt_early": (HALT | {"threshold": 0.4}, None),
    "halt_every_second": (HALT | {"every": 2, "threshold": 0.7}, None),
    "halt_moe": (HALT, {"every": 2, "first": 1}),
    "ponder": (HALT | {"halting": "ponder", "threshold": 0.8, "soft_steps": 3}, None),
    "tsa": (HALT | {"halting": "tsa", "threshold": 0.6, "soft_steps": 3} | MLP, None),
    "tsa_every_second": (HALT | {"halting": "tsa", "threshold": 0.4, "every": 2}, {"every": 2}),
    "halt_loops": (HALT, None),
    "tsa_loops": (HALT | {"halting": "tsa", "threshold": 0.6, "soft_steps": 3}, None),
    "skip_loops": (SKIP, None),
    "skip_previous": (SKIP | {"decide_at": "previous", "every": 1}, None),
    "skip_early": (SKIP | {"decide_at": "early"} | MLP | {"predictor": "mlp"}, None),
    "leap_early": (LEAP | {"decide_at": "early"}, None),
    "leap": (LEAP, None),
    "leap_most": (LEAP | {"protect": 0, "threshold": 0.8, "every": 2, "first": 1}, None),
    "leap_moe": (LEAP | {"protect": 2, "router": "mlp", "router_hidden": 8}, {"every": 2}),
    "leap_previous_moe": (LEAP | {"decide_at": "previous"}, {"every": 2}),
    "position": (SKIP | {"router": "position", "router_hidden": 4}, None),
}


def depth_model(name, **more):
    routing, moe = VARIANTS[name]
    sizes = {"layers": 4} | LOOPS.get(name, {})
    return small_model(moe, routing=RoutingConfig(**routing), **sizes | more)


def oracle(model, ids_S):
    if model.config.routing.kind in ("skip", "leap"):
        return *skip_logits(model, ids_S), torch.zeros(len(ids_S))
    return halt_logits(model, ids_S)


def sequences(ids_T, offsets_B1):
    return [ids_T[a:b] for a, b in zip(offsets_B1.tolist(), offsets_B1.tolist()[1:], strict=False)]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", VARIANTS)
def test_executed_equals_masked_forward_and_backward(name, training):
    model = depth_model(name).double().train(training)
    ids_T, position_T, offsets_B1 = packed(LENGTHS)
    ledger = Ledger()
    output = model(ids_T, position_T, offsets_B1, context=Context(ledger=ledger))
    parts = [oracle(model, ids_S) for ids_S in sequences(ids_T, offsets_B1)]
    wanted_TV = torch.cat([logits for logits, _, _ in parts]).float()
    torch.testing.assert_close(output.logits_TV, wanted_TV, rtol=1e-5, atol=1e-6)
    ran = torch.cat([ran for _, ran, _ in parts], 1).sum(1)
    assert 0 < ran.sum() < 4 * sum(LENGTHS)  # the test shows something
    if model.config.moe is None:
        row = 6 * 16 * 24
        assert ledger.by_op()["mlp"] == (int(ran.sum()) * row, 4 * sum(LENGTHS) * row)
    if training and model.config.routing.kind == "halt" and output.depth[-1]:
        ponder = torch.cat([ponder for _, _, ponder in parts]).mean()
        torch.testing.assert_close(output.depth[-1]["ponder"], ponder)
    probe_TV = torch.randn(wanted_TV.shape, generator=torch.Generator().manual_seed(1))
    parameters = [p for p in model.parameters() if p.requires_grad]
    ours, theirs = (
        torch.autograd.grad((out * probe_TV).sum(), parameters, allow_unused=True)
        for out in (output.logits_TV, wanted_TV)
    )
    for (where, _), a, b in zip(model.named_parameters(), ours, theirs, strict=True):
        # a block that nobody takes is not in the graph of the one, and has zeros in the other
        a, b = (torch.zeros(()) if g is None else g for g in (a, b))
        torch.testing.assert_close(*torch.broadcast_tensors(a.double(), b.double()), msg=where)


@pytest.mark.parametrize("name", VARIANTS)
def test_batch_composition_does_not_matter(name):
    for training in (True, False):
        model = depth_model(name).train(training)
        ids_T, position_T, offsets_B1 = packed(LENGTHS)
        together = model(ids_T, position_T, offsets_B1).logits_TV
        for a, b in zip(offsets_B1.tolist(), offsets_B1.tolist()[1:], strict=False):
            alone = model(ids_T[a:b], position_T[a:b], torch.tensor([0, b - a])).logits_TV
            torch.testing.assert_close(together[a:b], alone, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", VARIANTS)
def test_prefill_then_decode_is_one_forward_without_a_cache(name):
    model = depth_model(name).double().eval()
    ids_T, position_T, offsets_B1 = packed(LENGTHS)
    ledger = Ledger()
    wanted = model(ids_T, position_T, offsets_B1, context=Context(ledger=ledger)).logits_TV
    starts = offsets_B1.tolist()
    for prompts in ([0, 0, 0, 0], [4, 1, 2, 3], [5, 0, 6, 1]):
        cache, got = KVCache(model.config.steps, len(LENGTHS)), torch.full_like(wanted, torch.nan)
        done, decoding = [0] * len(LENGTHS), Ledger()
        for step in [prompts, *([1] * len(LENGTHS) for _ in range(max(LENGTHS)))]:
            sizes = [min(n, L - d) for n, L, d in zip(step, LENGTHS, done, strict=True)]
            pieces = [
                torch.arange(s + d, s + d + n) for s, d, n in zip(starts, done, sizes, strict=False)
            ]
            take = torch.cat(pieces)
            offsets = torch.tensor([0, *sizes]).cumsum(0).int()
            context = Context(ledger=decoding)
            out = model(ids_T[take], position_T[take], offsets, cache=cache, context=context)
            got[take] = out.logits_TV
            done = [d + n for d, n in zip(done, sizes, strict=True)]
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
        assert decoding.by_op() == ledger.by_op()


@torch.no_grad()
@pytest.mark.parametrize("name", VARIANTS)
def test_a_suffix_changes_the_prefix_only_in_training_a_skip(name):
    for training in (True, False):
        model = depth_model(name).train(training)
        changed = False
        for seed in range(8):
            ids_T, *where = packed([12], seed)
            other_T = torch.cat([ids_T[:7], (ids_T[7:] + 1 + seed) % VOCAB])
            prefix, other = (model(x, *where).logits_TV[:7] for x in (ids_T, other_T))
            changed |= (prefix - other).abs().max() > 1e-3
        by_position = model.config.routing.router == "position"
        assert changed == (training and name.startswith("skip")) or by_position


@pytest.mark.parametrize("name", VARIANTS)
def test_activation_checkpointing_changes_no_gradient_and_counts_nothing_twice(name):
    ids_T, position_T, offsets_B1 = packed(LENGTHS)
    seen = []
    for recompute in (False, True):
        model, ledger, observed = depth_model(name, recompute=recompute), Ledger(), []
        context = Context(ledger=ledger, observe=lambda i, c, p, o=observed: o.append((i, c)))
        output = model(ids_T, position_T, offsets_B1, context=context)
        loss = token_loss(output.logits_TV, ids_T) + model.aux_loss(output)
        loss.backward()
        seen.append((loss, [p.grad for p in model.parameters()], ledger.by_op(), observed))
    (loss, grads, flops, observed), (loss2, grads2, flops2, observed2) = seen
    assert torch.equal(loss, loss2) and flops == flops2 and len(observed) == len(observed2)
    for (_, choice), (_, choice2) in zip(observed, observed2, strict=True):
        assert torch.equal(choice.target_TK, choice2.target_TK)
        assert len(choice.target_TK) == sum(LENGTHS)  # by token, also inside a routed block
    for a, b in zip(grads, grads2, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("name", ["ponder", "tsa", "tsa_loops"])
def test_while_halting_is_soft_nobody_leaves_and_the_numbers_are_the_masked_ones(name):
    model = depth_model(name).double()
    batch = packed(LENGTHS)
    parts = [halt_logits(model, ids_S, soft=True) for ids_S in sequences(batch[0], batch[2])]
    wanted_TV = torch.cat([logits for logits, _, _ in parts]).float()
    for training, step in ((True, 2), (False, None)):
        model.train(training).soften_routers(not training)
        ledger = Ledger()
        output = model(*batch, context=Context(ledger=ledger, step=step))
        torch.testing.assert_close(output.logits_TV, wanted_TV, rtol=1e-5, atol=1e-6)
        executed, dense = ledger.by_op()["mlp"]
        assert executed == dense
    model.soften_routers(False)
    hard_TV = model(*batch).logits_TV
    assert (hard_TV - wanted_TV).abs().max() > 1e-3  # the threshold does something
    after = Ledger()
    model.train()(*batch, context=Context(ledger=after, step=3))
    executed, dense = after.by_op()["mlp"]
    assert executed < dense


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 7), min_size=0, max_size=4),
    keep=st.sampled_from([0.01, 0.5, 1.0]),
    training=st.booleans(),
)
def test_any_lengths_and_any_keep(lengths, keep, training):
    routing = RoutingConfig(kind="skip", keep=keep, every=1, first=0)
    model = small_model(None, routing=routing).double().train(training)
    batch = packed(lengths)
    output = model(*batch)
    parts = [skip_logits(model, ids_S)[0] for ids_S in sequences(batch[0], batch[2]) if len(ids_S)]
    wanted = torch.cat(parts) if parts else torch.zeros(0, VOCAB)
    torch.testing.assert_close(output.logits_TV, wanted.float(), rtol=1e-5, atol=1e-6)
    (output.logits_TV.sum() + model.aux_loss(output)).backward()


@torch.no_grad()
@pytest.mark.parametrize(
    ("start", "protect", "computed"), [(40.0, 0, 0), (40.0, 1, 1), (40.0, 3, 3), (-40.0, 0, 9)]
)
def test_nobody_leaps_everybody_or_all_but_the_protected(start, protect, computed):
    routing = RoutingConfig(**LEAP | {"start": start, "protect": protect})
    for training in (True, False):
        model = small_model(None, routing=routing, layers=2).double().train(training)
        ids_T, position_T, offsets_B1 = packed(LENGTHS)
        ledger = Ledger()
        logits_TV = model(ids_T, position_T, offsets_B1, context=Context(ledger=ledger)).logits_TV
        parts = [skip_logits(model, ids_S)[0] for ids_S in sequences(ids_T, offsets_B1)]
        torch.testing.assert_close(logits_TV, torch.cat(parts).float(), rtol=1e-5, atol=1e-6)
        rows = sum(min(n, computed) for n in LENGTHS)
        assert ledger.by_op()["mlp"][0] == 2 * rows * 6 * 16 * 24


@torch.no_grad()
def test_a_token_that_leapt_comes_back():
    model, ran = depth_model("leap").eval(), []
    model(*packed(LENGTHS), context=Context(observe=lambda i, c, p: ran.append(c.target_TK >= 0)))
    ran_TL = torch.cat(ran, 1)
    assert (~ran_TL[:, :-1] & ran_TL[:, 1:]).any()


def test_the_predictor_learns_whom_training_keeps():
    for predictor in ("score", "mlp"):
        routing = RoutingConfig(
            kind="skip", keep=0.4, every=1, first=0, predictor=predictor, predictor_loss=1.0,
            router_hidden=32,
        )  # fmt: skip
        model = small_model(None, routing=routing, layers=2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for step in range(150):
            batch = packed([16] * 8, seed=step)
            output = model(*batch)
            loss = token_loss(output.logits_TV, batch[0]) / 128 + model.aux_loss(output)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        ledger = Ledger()
        model.eval()(*packed([16] * 8, seed=999), context=Context(ledger=ledger))
        executed, dense = ledger.by_op()["mlp"]
        assert 0.3 < executed / dense < 0.5, (predictor, executed / dense)


def test_generate_is_the_same_alone_and_together():
    for name in ("skip", "halt", "skip_moe", "leap"):
        model = depth_model(name)
        prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
        sampling = Sampling(max_new_tokens=12, temperature=0.0)
        together = generate(model, prompts, sampling)
        assert together == [generate(model, [p], sampling)[0] for p in prompts]


def test_a_depth_router_that_is_frozen_has_no_gradient():
    for routing in (SKIP | {"predictor": "mlp"}, HALT):
        model = small_model(None, routing=RoutingConfig(**routing, frozen=True))
        output = model(*packed(LENGTHS))
        (output.logits_TV.sum() + model.aux_loss(output)).backward()
        learned = {n for n, p in model.named_parameters() if p.grad is not None and "router" in n}
        assert not learned
        assert any("predictor" in n for n, p in model.named_parameters() if p.grad is not None) == (
            routing["kind"] == "skip"
        )


def test_a_causal_lm_refuses_to_prune():
    with pytest.raises(ConfigError, match=r"routing\.kind=prune: want skip, halt or leap"):
        small_model(None, routing=RoutingConfig(kind="prune"))
    model = small_model({"policy": "expert_choice"}, routing=RoutingConfig(**SKIP))
    with pytest.raises(NotCausalError, match="expert_choice"):
        generate(model, [[1]], Sampling(max_new_tokens=1))
