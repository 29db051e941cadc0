"""The image classifier: packed equals alone, pruned equals masked, a patch knows its place."""

import pytest
import torch

from moe_router import Context, Ledger
from moe_router.config import ImageConfig, ModelConfig, MoEConfig, RoutingConfig
from moe_router.errors import ConfigError
from moe_router.models import ImageClassifier, init_parameters
from tests.models.oracle import class_logits

IMAGE = ImageConfig(size=8, channels=3, patch=2)
PRUNE = RoutingConfig(kind="prune", keep=0.6, every=1, first=0)
MOE = MoEConfig(experts=6, top_k=2, hidden=8, shared_hidden=4)


def classifier(routing=None, moe=None, **more):
    sizes = {"layers": 3, "dim": 32, "heads": 4, "kv_heads": 2, "hidden": 24, "rope_theta": 10.0}
    config = ModelConfig(kind="vit", **sizes | more, moe=moe, routing=routing)
    model = ImageClassifier(config, IMAGE, classes=5)
    init_parameters(model, seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter *= 8.0
    model.embed.normalise_by((90.0, 120.0, 70.0), (60.0, 50.0, 80.0))
    return model


def batch(count, seed=0):
    """patch_TP, position_T, offsets_B1 of random images."""
    generator = torch.Generator().manual_seed(seed)
    n = IMAGE.tokens
    patch_TP = torch.randint(0, 256, (count * n, IMAGE.values), generator=generator)
    position_T = torch.arange(n, dtype=torch.int32).repeat(count)
    return patch_TP.to(torch.uint8), position_T, torch.arange(0, count * n + 1, n).int()


@pytest.mark.parametrize("moe", [None, MOE], ids=["dense", "moe"])
@pytest.mark.parametrize("routing", [None, PRUNE], ids=["all", "prune"])
def test_executed_equals_masked_forward_and_backward(routing, moe):
    model, ledger = classifier(routing, moe).double(), Ledger()
    patch_TP, *where = batch(3)
    output = model(patch_TP, *where, context=Context(ledger=ledger))
    parts = [class_logits(model, patch_SP) for patch_SP in patch_TP.split(IMAGE.tokens)]
    wanted_BC = torch.stack([logits for logits, _ in parts]).float()
    torch.testing.assert_close(output.logits_BC, wanted_BC, rtol=1e-5, atol=1e-6)
    if routing is not None and moe is None:
        ran, row = sum(int(ran.sum()) for _, ran in parts), 6 * 32 * 24
        assert ran == 3 * (16 + 10 + 6)  # ceil(0.6 * 16), ceil(0.6 * 10)
        assert ledger.by_op()["mlp"] == (ran * row, 3 * 3 * 16 * row)
    probe_BC = torch.randn(wanted_BC.shape, generator=torch.Generator().manual_seed(1))
    ours, theirs = (
        torch.autograd.grad((out * probe_BC).sum(), list(model.parameters()), allow_unused=True)
        for out in (output.logits_BC, wanted_BC)
    )
    for (name, _), a, b in zip(model.named_parameters(), ours, theirs, strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            torch.testing.assert_close(a.double(), b.double(), msg=name)


@torch.no_grad()
@pytest.mark.parametrize("routing", [None, PRUNE], ids=["all", "prune"])
def test_batch_composition_does_not_matter(routing):
    model = classifier(routing).double()
    patch_TP, position_T, offsets_B1 = batch(4)
    together = model(patch_TP, position_T, offsets_B1).logits_BC
    for b, patch_SP in enumerate(patch_TP.split(IMAGE.tokens)):
        (alone_C,) = model(patch_SP, position_T[: IMAGE.tokens], offsets_B1[:2]).logits_BC
        torch.testing.assert_close(together[b], alone_C, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_every_patch_counts_and_so_does_its_place():
    model = classifier().double()
    patch_TP, position_T, offsets_B1 = batch(1)
    before = model(patch_TP, position_T, offsets_B1).logits_BC
    for t in range(IMAGE.tokens):
        other_TP = patch_TP.clone()
        other_TP[t] = 255 - other_TP[t]
        assert (model(other_TP, position_T, offsets_B1).logits_BC - before).abs().max() > 1e-3
    # the same patches in another order along the rows, along the columns
    for order in (torch.arange(16).view(4, 4).flip(0), torch.arange(16).view(4, 4).T):
        moved = model(patch_TP[order.flatten()], position_T, offsets_B1).logits_BC
        assert (moved - before).abs().max() > 1e-3


@torch.no_grad()
def test_an_image_is_seen_as_the_channels_of_training_were():
    model = classifier()
    patch_TP = batch(1)[0]
    pixels = (patch_TP.float().view(16, 2, 2, 3) - torch.tensor([90.0, 120.0, 70.0])) / (
        torch.tensor([60.0, 50.0, 80.0])
    )
    wanted_TD = pixels.flatten(1) @ model.embed.weight.T + model.embed.bias
    torch.testing.assert_close(model.embed(patch_TP), wanted_TD)
    assert {"embed.mean_P", "embed.std_P"} <= set(model.state_dict())


def test_heads_must_turn_by_row_and_by_column():
    with pytest.raises(ConfigError, match=r"^model\.dim=24: want a multiple of 16"):
        classifier(dim=24)
