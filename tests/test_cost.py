"""Counts from the config alone equal those of the model that is built from it."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moe_router import Context, Ledger
from moe_router.config import AttentionConfig
from moe_router.config_file import load_config
from moe_router.cost import BYTE_VOCAB, cost
from moe_router.models import CausalLM, ImageClassifier, TextClassifier

TINY = [
    "model.layers=3",
    "model.dim=32",
    "model.heads=4",
    "model.hidden=48",
    "model.moe.hidden=24",
    "data.seq_len=16",
]
LABELLED = [
    "model.kind=encoder",
    "data.source=labelled",
    "data.path=none.csv",
    "data.labels=[a, b, c]",
]
IMAGES = [
    "model.kind=vit",
    "data.source=images",
    "data.path=none",
    "data.labels=[a, b, c]",
    "data.image={size: 16, channels: 1, patch: 4}",
]
VARIANTS = {
    "moe": [],
    "dense": ["model.moe=null"],
    "untied": ["model.tie_embeddings=false"],
    "shared": ["model.moe.shared_hidden=40"],
    "some layers": ["model.moe.first=1", "model.moe.every=2"],
    "mlp router": ["model.moe.router=mlp", "model.moe.null_experts=3"],
    "position router": ["model.moe.router=position"],
    "experts choose": ["model.moe.policy=expert_choice", "model.moe.capacity_factor=1.5"],
    "skip": ["model.moe=null", "model.routing={kind: skip, predictor: mlp, keep: 0.25}"],
    "skip experts": ["model.routing={kind: skip, router: position}"],
    "halt": ["model.moe=null", "model.routing={kind: halt, router: mlp, first: 0, every: 1}"],
    "ponder": ["model.moe=null", "model.routing={kind: halt, halting: ponder}"],
    "loops": ["model.moe=null", "model.loops=3", "model.routing={kind: halt, halting: tsa}"],
    "loops alone": ["model.moe=null", "model.loops=2"],
    "encoder": ["model.moe=null", *LABELLED],
    "prune": ["model.moe=null", *LABELLED, "model.routing={kind: prune, keep: 0.5}"],
    "merge": ["model.moe=null", *LABELLED, "model.routing={kind: merge, keep: 0.5}"],
    "merge neighbours": [*LABELLED, "model.routing={kind: merge, router: position}"],
    "vit": ["model.moe=null", *IMAGES],
    "vit prune": [*IMAGES, "model.routing={kind: prune, keep: 0.5}"],
    "clusters": [
        "model.moe=null",
        "model.attention={kind: routed, select: clusters, router: linear}",
    ],
    "clusters by place": [
        "model.attention={kind: routed, select: clusters, router: position, dense_last: 1}"
    ],
    "prune experts": [*LABELLED, "model.routing={kind: prune, router: mlp, first: 0, every: 1}"],
}


def tiny(variant):
    return load_config("quickstart", TINY + VARIANTS[variant])


def model_of(config):
    if config.model.kind == "encoder":
        return TextClassifier(config.model, BYTE_VOCAB, len(config.data.labels))
    if config.model.kind == "vit":
        return ImageClassifier(config.model, config.data.image, len(config.data.labels))
    return CausalLM(config.model, BYTE_VOCAB)


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_are_those_of_the_model(variant):
    config = tiny(variant)
    model = model_of(config)
    total = cost(config)
    assert total.parameters == sum(p.numel() for p in model.parameters())
    router = [
        p.numel()
        for name, p in model.named_parameters()
        if "router." in name or "predictor." in name
    ]
    assert total.router_parameter_share == sum(router) / total.parameters
    for i, block in enumerate(model.blocks):
        held = sum(part.parameters for part in total.of_layer(str(i)))
        leave = [kind[str(i)] for kind in (model.halts, model.prunes) if str(i) in kind]
        own = [p for module in (block, *leave) for p in module.parameters()]
        assert held == sum(p.numel() for p in own)


def test_a_skipped_block_costs_what_it_keeps():
    whole, routed = cost(tiny("dense")), cost(tiny("skip"))
    (mlp,) = (part for part in routed.of_layer("1") if part.name == "mlp")
    assert mlp.flops == round(0.25 * mlp.dense_flops)
    assert routed.of_layer("0") == whole.of_layer("0")
    assert routed.dense_flops == whole.dense_flops > routed.flops


def test_a_merging_block_feeds_fewer_than_it_attends_to():
    whole, routed = cost(tiny("encoder")), cost(tiny("merge"))
    flops = {(part.layer, part.name): part.flops for part in routed.parts}
    dense = {(part.layer, part.name): part.flops for part in whole.parts}
    assert flops["1", "attention"] == dense["1", "attention"]
    assert flops["1", "mlp"] == dense["1", "mlp"] // 2 == flops["2", "mlp"]
    assert flops["1", "router"] == 8 * 16 // 2  # channels of a head, half of 16 tokens to look at
    assert routed.router_parameter_share == 0


def test_blocks_after_a_prune_cost_what_stays():
    whole, routed = cost(tiny("encoder")), cost(tiny("prune"))
    flops = {(part.layer, part.name): part.flops for part in routed.parts}
    dense = {(part.layer, part.name): part.flops for part in whole.parts}
    for layer in ("0", "1"):
        assert flops[layer, "mlp"] == dense[layer, "mlp"]
    assert flops["2", "mlp"] == dense["2", "mlp"] // 2
    # half of the tokens, and each sees half as many
    S, D = 16, 32
    seen = dense["2", "attention"] - 2 * whole.of_layer("2")[0].parameters
    assert seen == 4 * D * S
    assert flops["2", "attention"] == (dense["2", "attention"] - seen // 2) // 2


@pytest.mark.parametrize("variant", ["dense", "encoder"])
def test_routed_attention_costs_the_pairs_that_it_computes(variant):
    """And the choice; what the model's own account says it has executed."""
    how = AttentionConfig(kind="routed", block=4, top_k=2, window=0, dense_last=1)
    config = tiny(variant)
    routed = dataclasses.replace(config, model=dataclasses.replace(config.model, attention=how))
    model, S, ledger = model_of(routed), config.data.seq_len, Ledger()
    batch = (torch.zeros(S, dtype=torch.int64), torch.arange(S).int(), torch.tensor([0, S]).int())
    model(*batch, context=Context(ledger=ledger))
    executed, dense = ledger.by_op()["attention"]
    parts = [part for part in cost(routed).parts if part.name == "attention"]
    # parts are rounded to a token
    assert sum(part.flops for part in parts) == pytest.approx(executed / S, abs=len(parts))
    assert sum(part.dense_flops for part in parts) == pytest.approx(dense / S, abs=len(parts))
    assert parts[-1].flops == parts[-1].dense_flops > parts[0].flops


def test_clusters_cost_what_equally_full_ones_do():
    """What the model's own account says it executes, where clusters are even."""
    how = AttentionConfig(
        kind="routed", select="clusters", router="linear", clusters=4, window=3, global_tokens=2
    )
    config, S = tiny("dense"), 16
    routed = dataclasses.replace(config, model=dataclasses.replace(config.model, attention=how))
    model, ledger = model_of(routed), Ledger()
    for block in model.blocks:
        even = torch.nn.functional.one_hot(torch.arange(S) % 4, 4)[:, None].float()
        heads = config.model.kv_heads
        even = even.repeat(1, heads, 1)
        block.attention.routed.router._logits = lambda *_, even=even: even
    batch = (torch.zeros(S, dtype=torch.int64), torch.arange(S).int(), torch.tensor([0, S]).int())
    model.eval()(*batch, context=Context(ledger=ledger))
    parts = [p for p in cost(routed).parts if p.name == "attention" or p.dense_flops == 0 < p.flops]
    expected = sum(part.flops for part in parts) * S
    # of 16 tokens, which cluster is near is not quite chance
    assert expected == pytest.approx(ledger.by_op()["attention"][0], rel=0.01)


@pytest.mark.parametrize("variant", ["dense", "untied", "encoder"])
def test_flops_are_those_torch_counts(variant):
    """Where torch's counter knows every product: a dense model. It counts attention unmasked."""
    config = tiny(variant)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, moe=None))
    model, S = model_of(config), config.data.seq_len
    ids_T = torch.zeros(S, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(ids_T, torch.arange(S).int(), torch.tensor([0, S]).int())
    counted = sum(
        flops
        for op, flops in counter.get_flop_counts()["Global"].items()
        if "attention" not in str(op)
    )
    total, D = cost(config), config.model.dim
    keys = 2 * S if config.model.kind == "encoder" else S + 1
    assert counted == S * (total.flops - config.model.layers * 2 * D * keys)


def test_expert_flops_by_hand():
    config = load_config("quickstart")
    total = cost(config)
    experts = [part for part in total.parts if part.name == "experts"]
    assert [part.flops for part in experts] == [6 * 2 * 128 * 256] * 4  # 6 * K * D * F
    assert [part.dense_flops for part in experts] == [6 * 8 * 128 * 256] * 4
    assert [part.parameters for part in experts] == [8 * 3 * 128 * 256] * 4
    assert total.flops_per_step == 3 * total.flops * 16 * 128
    assert total.equal_width == 512
    assert total.bytes == 4 * total.parameters


def test_memory_of_the_fullest_rank():
    """Uneven experts, fsdp: 16 bytes a parameter: weight, gradient and two moments in fp32."""
    config = load_config("quickstart", ["cluster.actors=4", "model.moe.experts=6"])
    total = cost(config)
    experts = sum(part.parameters for part in total.parts if part.name == "experts")
    dense = total.parameters - experts
    assert total.bytes_per_rank == 16 * (dense + experts * 2 // 6)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, dense="fsdp"))
    assert cost(config).bytes_per_rank == 16 * (dense // 4 + experts * 2 // 6)


def test_equal_flops_dense_model_costs_the_same():
    """The dense control of a quality claim: `equal_width` in the place of the experts."""
    routed = load_config("quickstart", ["model.moe.shared_hidden=128"])
    width = cost(routed).equal_width
    dense = load_config("quickstart", ["model.moe=null", f"model.hidden={width}"])
    router = sum(part.flops for part in cost(routed).parts if part.name == "router")
    assert cost(routed).flops - router == cost(dense).flops


def test_ranks_share_the_memory_alone():
    """The same for any number of ranks: parameters are those of all of them together."""
    one, four = (cost(load_config("quickstart", [f"cluster.actors={n}"])) for n in (1, 4))
    assert one.parts == four.parts and one.bytes_per_rank > four.bytes_per_rank
