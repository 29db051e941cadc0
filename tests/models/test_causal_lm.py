import pytest
import torch
import torch.nn.functional as F

from moe_router import Context, Ledger
from moe_router.models import CausalLM, KVCache, token_loss
from tests.models.helpers import VOCAB, packed, small_model

VARIANTS = {
    "dense": None,
    "moe": {},
    "capacity": {"capacity_factor": 0.8},
    "shared_bias": {"shared_hidden": 8, "bias_rate": 0.1, "score": "sigmoid"},
    "every_second": {"every": 2, "first": 1},
}
LENGTHS = [5, 1, 9, 3]


def logits(model, *batch, **more):
    with torch.no_grad():
        return model(*batch, **more).logits_TV


def test_the_state_dict_has_the_names_of_a_checkpoint():
    names = set(small_model({"first": 2, "shared_hidden": 4}, layers=3).state_dict())
    assert names >= {
        "embed.weight",
        "norm.weight",
        "blocks.0.attention_norm.weight",
        *(f"blocks.0.attention.{name}.weight" for name in "qkvo"),
        "blocks.0.mlp_norm.weight",
        "blocks.1.mlp.gate_up.weight",
        "blocks.1.mlp.down.weight",
        "blocks.2.moe.experts.gate_up",
        "blocks.2.moe.experts.down",
        "blocks.2.moe.shared.down.weight",
    }
    assert "head.weight" not in names
    assert "head.weight" in small_model(tie_embeddings=False).state_dict()


@pytest.mark.parametrize("name", VARIANTS)
def test_batch_composition_does_not_matter(name):
    model = small_model(VARIANTS[name]).eval()
    ids_T, position_T, offsets_B1 = packed(LENGTHS)
    together = logits(model, ids_T, position_T, offsets_B1)
    for a, b in zip(offsets_B1.tolist(), offsets_B1.tolist()[1:], strict=False):
        alone = logits(model, ids_T[a:b], position_T[a:b], torch.tensor([0, b - a]))
        torch.testing.assert_close(together[a:b], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_prefill_then_decode_is_one_forward_without_a_cache(name):
    model = small_model(VARIANTS[name]).eval()
    ids_T, position_T, offsets_B1 = packed(LENGTHS)
    wanted = logits(model, ids_T, position_T, offsets_B1)
    for prompts in ([0, 0, 0, 0], [4, 1, 2, 3], [5, 0, 6, 1]):
        cache, got = KVCache(len(model.blocks), len(LENGTHS)), torch.full_like(wanted, torch.nan)
        done = [0] * len(LENGTHS)
        steps = [prompts, *([1] * len(LENGTHS) for _ in range(max(LENGTHS)))]
        for step in steps:
            sizes = [min(n, L - d) for n, L, d in zip(step, LENGTHS, done, strict=True)]
            starts = [o + d for o, d in zip(offsets_B1.tolist(), done, strict=False)]
            parts = [torch.arange(s, s + n) for s, n in zip(starts, sizes, strict=True)]
            take = torch.cat(parts)
            offsets = torch.tensor([0, *sizes]).cumsum(0).int()
            got[take] = logits(model, ids_T[take], position_T[take], offsets, cache=cache)
            done = [d + n for d, n in zip(done, sizes, strict=True)]
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("moe", "training", "causal"),
    [
        (None, True, True),
        ({}, True, True),
        # a limit of ceil(0.5 * 12 * 2 / 6) = 2 rows: position drops, and only later tokens
        ({"capacity_factor": 0.5}, True, True),
        ({"capacity_factor": 0.5, "drop": "score"}, False, True),
        ({"policy": "expert_choice"}, True, False),
        ({"policy": "expert_choice"}, False, False),
    ],
)
def test_a_suffix_changes_the_prefix_only_where_routing_is_not_causal(moe, training, causal):
    model = small_model(moe).train(training)
    ids_T, *where = packed([12])
    other_T = torch.cat([ids_T[:7], (ids_T[7:] + 1) % VOCAB])
    prefix, other = logits(model, ids_T, *where)[:7], logits(model, other_T, *where)[:7]
    assert not torch.equal(logits(model, ids_T, *where)[7:], logits(model, other_T, *where)[7:])
    if causal:
        torch.testing.assert_close(prefix, other, rtol=1e-5, atol=1e-5)
    else:
        assert (prefix - other).abs().max() > 0.01
    assert model.causal == (moe is None or moe.get("policy") != "expert_choice")


@pytest.mark.parametrize(
    "moe",
    [None, {"jitter": 0.3, "capacity_factor": 0.7, "z_loss": 0.1}, {"sequence_balance_loss": 1.0}],
)
def test_activation_checkpointing_changes_no_gradient_and_counts_nothing_twice(moe):
    ids_T, position_T, offsets_B1 = packed(LENGTHS)
    seen = []
    for recompute in (False, True):
        model, ledger, observed = small_model(moe, recompute=recompute), Ledger(), []
        context = Context(ledger=ledger, observe=lambda i, c, p, o=observed: o.append((i, p.src_R)))
        output = model(ids_T, position_T, offsets_B1, context=context)
        loss = token_loss(output.logits_TV, ids_T) + model.aux_loss(output)
        loss.backward()
        seen.append((loss, [p.grad for p in model.parameters()], ledger.totals(), observed))
    (loss, grads, flops, observed), (loss2, grads2, flops2, observed2) = seen
    assert torch.equal(loss, loss2) and flops == flops2
    assert len(observed) == len(observed2) == (0 if moe is None else 3)
    for a, b in zip(grads, grads2, strict=True):
        assert torch.equal(a, b)


def test_recomputation_keeps_the_plan_even_when_scores_have_moved():
    """A tie that rounding breaks otherwise in the second run must not change the plan."""
    model = small_model({}, recompute=True)
    decided = []
    for block in model.blocks:
        block.moe.router.register_forward_hook(
            lambda _, __, choice: decided.append(choice.target_TK.clone())
        )
    output = model(*packed(LENGTHS))
    with torch.no_grad():
        for block in model.blocks:
            block.moe.router.score.weight.data = -block.moe.router.score.weight.data
    output.logits_TV.square().sum().backward()
    first, second = decided[:3], decided[3:]
    assert len(second) == 3
    for a, b in zip(first, reversed(second), strict=True):
        assert torch.equal(a, b)


def test_aux_loss_is_the_sum_of_the_layers():
    model = small_model({"z_loss": 0.5})
    output = model(*packed(LENGTHS))
    parts = [
        block.moe.aux_loss(routed.choice)
        for block, routed in zip(model.blocks, output.routed, strict=True)
    ]
    torch.testing.assert_close(model.aux_loss(output), sum(parts))
    dense = small_model(None)
    output = dense(*packed(LENGTHS))
    assert output.routed == (None, None, None) and dense.aux_loss(output) == 0


def test_autocast_gives_fp32_logits_near_those_of_fp32():
    model = small_model({}, std=2.0)
    batch = packed(LENGTHS)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(*batch)
        token_loss(output.logits_TV, batch[0]).backward()
    assert output.logits_TV.dtype == torch.float32
    assert all(routed.choice.weight_TK.dtype == torch.float32 for routed in output.routed)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    error = (output.logits_TV - logits(model, *batch)).abs().max() / output.logits_TV.abs().max()
    assert 0 < error < 0.1


def test_token_loss_is_a_sum_in_fp32():
    logits_TV, target_T = torch.randn(6, 9).bfloat16(), torch.randint(9, (6,))
    loss = token_loss(logits_TV, target_T)
    wanted = -logits_TV.float().log_softmax(-1)[torch.arange(6), target_T].sum()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, wanted)


def test_a_rank_without_tokens_runs():
    model = small_model({})
    output = model(*packed([]))
    assert output.logits_TV.shape == (0, VOCAB)
    assert F.cross_entropy(output.logits_TV, torch.zeros(0).long(), reduction="sum") == 0


def test_it_learns_to_count():
    model = small_model({}, std=4.0)
    assert isinstance(model, CausalLM)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids_T = (torch.arange(64) % VOCAB).roll(5)
    target_T = (ids_T + 1) % VOCAB
    _, position_T, offsets_B1 = packed([16] * 4)
    losses = []
    for _ in range(40):
        output = model(ids_T, position_T, offsets_B1)
        loss = token_loss(output.logits_TV, target_T) / 64 + model.aux_loss(output)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 < 2 < losses[0]
