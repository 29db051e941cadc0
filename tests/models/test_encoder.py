"""The text classifier: packed equals alone, pruned equals masked, every token sees its text."""

import re
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_router import Context, Ledger
from moe_router.config import RoutingConfig
from moe_router.errors import ConfigError
from tests.models.helpers import VOCAB, packed, small_model
from tests.models.oracle import class_logits

LENGTHS = [5, 1, 9, 3, 12]
PRUNE = {"kind": "prune", "keep": 0.5, "every": 1, "first": 0}
THRESHOLD = {"kind": "prune", "decide": "threshold", "every": 1, "first": 0}
DEPTH = {
    "none": None,
    "prune": PRUNE,
    "prune_little": PRUNE | {"keep": 0.8, "every": 2},
    "prune_most": PRUNE | {"keep": 0.1},
    "prune_mlp": PRUNE | {"router": "mlp", "router_hidden": 8},
    "prune_position": PRUNE | {"router": "position", "router_hidden": 4},
    "prune_received": PRUNE | {"router": "attention"},
    "threshold": THRESHOLD,
    "threshold_high": THRESHOLD | {"threshold": 0.9, "protect": 0, "min_keep": 2},
    "threshold_sinks": THRESHOLD | {"protect": 4, "threshold": 0.7, "every": 2},
    "threshold_received": THRESHOLD | {"router": "attention", "threshold": 0.97},
}
OTHER = {
    "skip": {"kind": "skip", "keep": 0.5, "every": 2, "first": 1},
    "halt": {"kind": "halt", "start": -0.5, "every": 1, "first": 0},
}
MOE = {"dense": None, "moe": {"shared_hidden": 4}, "every_second": {"every": 2, "first": 1}}


def classifier(depth="none", moe="dense", **more):
    routing = (DEPTH | OTHER)[depth]
    routing = None if routing is None else RoutingConfig(**routing)
    return small_model(MOE[moe], routing=routing, layers=4, classes=3, **more)


def texts(ids_T, offsets_B1):
    return [ids_T[a:b] for a, b in pairwise(offsets_B1.tolist())]


def equals_masked(model, context, **how):
    """Values, gradients and, of a dense model, FLOPs; returns the share of blocks that ran."""
    ids_T, position_T, offsets_B1 = packed(LENGTHS)
    ledger = Ledger()
    output = model(ids_T, position_T, offsets_B1, context=replace(context, ledger=ledger))
    parts = [class_logits(model, ids_S, **how) for ids_S in texts(ids_T, offsets_B1)]
    wanted_BC = torch.stack([logits for logits, _ in parts]).float()
    assert output.logits_BC.dtype == torch.float32
    torch.testing.assert_close(output.logits_BC, wanted_BC, rtol=1e-5, atol=1e-6)
    ran = sum(int(ran.sum()) for _, ran in parts)
    if model.config.routing is not None and model.config.moe is None:
        row = 6 * 16 * 24
        assert ledger.by_op()["mlp"] == (ran * row, 4 * sum(LENGTHS) * row)
    probe_BC = torch.randn(wanted_BC.shape, generator=torch.Generator().manual_seed(1))
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    ours, theirs = (
        torch.autograd.grad((out * probe_BC).sum(), [p for _, p in named], allow_unused=True)
        for out in (output.logits_BC, wanted_BC)
    )
    for (name, _), a, b in zip(named, ours, theirs, strict=True):
        # a router of balance alone is in neither graph; one that only evaluates is in one
        if model.training:
            assert (a is None) == (b is None), name
        if a is not None:
            torch.testing.assert_close(a.double(), b.double(), msg=name)
    return ran / (4 * sum(LENGTHS))


@pytest.mark.parametrize("moe", MOE)
@pytest.mark.parametrize("depth", DEPTH)
def test_executed_equals_masked_forward_and_backward(depth, moe):
    share = equals_masked(classifier(depth, moe).double(), Context())
    assert share == 1 if depth == "none" else 0.2 < share < 1  # the test shows something


@pytest.mark.parametrize("depth", [name for name in DEPTH if name.startswith("threshold")])
def test_a_soft_threshold_weighs_tokens_and_a_hard_one_lets_them_go(depth):
    model = classifier(depth).double()
    model.config = replace(model.config, routing=replace(model.config.routing, soft_steps=3))
    for prune in model.prunes.values():
        prune.config = model.config.routing
    assert equals_masked(model, Context(step=2), soft=True) == 1  # 0 saved: every token was there
    hard = equals_masked(model, Context(step=3))
    assert hard < 1
    assert equals_masked(model.eval(), Context(step=2)) == hard


@torch.no_grad()
def test_protected_tokens_and_the_least_number_stay_whatever_the_threshold():
    for more in ({"protect": 3}, {"protect": 0, "min_keep": 3}):
        model = classifier("threshold").eval()
        for prune in model.prunes.values():
            prune.config = replace(prune.config, threshold=1.0, **more)  # nobody is above it
        seen = []
        context = Context(observe=lambda i, c, p, s=seen: s.append(c.target_TK[:, 0] >= 0))
        model(*packed(LENGTHS), context=context)
        parts = seen[-1].split(LENGTHS)
        assert [int(part.sum()) for part in parts] == [min(n, 3) for n in LENGTHS]
        assert all(part[:3].all() for part in parts) == ("protect" in more and more["protect"] == 3)


@pytest.mark.parametrize(
    ("routing", "message"),
    [
        (THRESHOLD | {"threshold": 0.0}, "routing.threshold=0.0: want 0 < threshold <= 1, or null"),
        (THRESHOLD | {"temperature": 0.0}, "routing.temperature=0.0: want above 0"),
        (THRESHOLD | {"min_keep": 0}, "routing.min_keep=0: want at least 1 token"),
        (THRESHOLD | {"protect": -1}, "routing.protect=-1: want 0 or more tokens"),
        ({"kind": "halt", "decide": "threshold"}, "decide=threshold: want top, or model.routing."),
        ({"kind": "skip", "router": "attention"}, "router=attention: want linear, mlp or position"),
    ],
)
def test_a_bad_config_is_one_line(routing, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as refused:
        RoutingConfig(**routing)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("moe", MOE)
@pytest.mark.parametrize("depth", DEPTH | OTHER)
def test_batch_composition_does_not_matter(depth, moe):
    for training in (True, False):
        model = classifier(depth, moe).double().train(training)
        ids_T, position_T, offsets_B1 = packed(LENGTHS)
        together = model(ids_T, position_T, offsets_B1).logits_BC
        for b, ids_S in enumerate(texts(ids_T, offsets_B1)):
            position_S, bounds = torch.arange(len(ids_S)).int(), torch.tensor([0, len(ids_S)])
            (alone_C,) = model(ids_S, position_S, bounds).logits_BC
            torch.testing.assert_close(together[b], alone_C, rtol=1e-5, atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=6), st.sampled_from(sorted(DEPTH)))
def test_every_sequence_has_its_row_also_an_empty_one(lengths, depth):
    model = classifier(depth).double()
    logits_BC = model(*packed(lengths)).logits_BC
    assert logits_BC.shape == (len(lengths), 3) and logits_BC.isfinite().all()
    for n, logits_C in zip(lengths, logits_BC, strict=True):
        assert torch.equal(logits_C, model.head.bias.float()) == (n == 0)


@torch.no_grad()
def test_every_token_counts_and_so_does_their_order():
    model = classifier().double()
    ids_T, *where = packed([8])
    before = model(ids_T, *where).logits_BC
    for i in range(8):
        other_T = ids_T.clone()
        other_T[i] = (ids_T[i] + 1) % VOCAB
        assert (model(other_T, *where).logits_BC - before).abs().max() > 1e-3
    assert (model(ids_T.flip(0), *where).logits_BC - before).abs().max() > 1e-3


@torch.no_grad()
def test_the_first_token_sees_the_last():
    model = classifier()
    seen = []
    model.blocks[0].register_forward_hook(lambda _, __, out: seen.append(out.x_TD))
    ids_T, *where = packed([6])
    model(ids_T, *where)
    model(torch.cat([ids_T[:5], (ids_T[5:] + 1) % VOCAB]), *where)
    assert (seen[0][0] - seen[1][0]).abs().max() > 1e-4


@pytest.mark.parametrize("moe", MOE)
@pytest.mark.parametrize("depth", DEPTH | OTHER)
def test_activation_checkpointing_changes_no_gradient(depth, moe):
    grads = []
    for recompute in (False, True):
        model = classifier(depth, moe, recompute=recompute)
        output = model(*packed(LENGTHS))
        loss = output.logits_BC.square().sum() + model.aux_loss(output)
        loss.backward()
        grads.append([p.grad for p in model.parameters()])
    for kept, again in zip(*grads, strict=True):
        assert (kept is None and again is None) or torch.equal(kept, again)


def test_the_losses_of_its_experts_are_the_coefficients_times_what_they_report():
    model = classifier(moe="moe")
    output = model(*packed(LENGTHS))
    assert len(output.routed) == 4 and all(routed is not None for routed in output.routed)
    wanted = sum(0.01 * routed.choice.losses["balance"] for routed in output.routed)
    torch.testing.assert_close(model.aux_loss(output), wanted)
    assert model.aux_loss(output).requires_grad


def test_weights_are_those_of_the_seed_and_the_head_starts_without_an_opinion():
    model, again = classifier(std=1.0), classifier(std=1.0)
    for (name, a), b in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert not model.head.bias.any()
    assert 0.01 < model.head.weight.std() < 0.03
