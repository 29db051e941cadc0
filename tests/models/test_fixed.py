"""Decoding in steps of fixed shapes: the numbers of any other decoding, in one CUDA graph."""

import pytest
import torch

from moe_router.config import RoutingConfig
from moe_router.errors import ConfigError
from moe_router.layers import linear
from moe_router.models import KVCache
from moe_router.models.fixed import FixedStep
from moe_router_kernels import kept_op
from tests.cuda_graphs import captured
from tests.models.helpers import packed, small_model
from tests.models.test_depth import LOOPS, VARIANTS

B, TOKENS = 3, 9
FIXED = ["skip", "skip_all_blocks", "skip_mlp_predictor", "skip_early", "skip_loops", "leap"]
FIXED += ["leap_most", "leap_early", "position", "skip_previous"]


def model_of(name, **more):
    routing = None if name == "dense" else RoutingConfig(**VARIANTS[name][0])
    sizes = {"layers": 4} | LOOPS.get(name, {})
    return small_model(None, routing=routing, **sizes | more).eval()


def texts(vocab):
    """(TOKENS, B): a row is what the sequences read in one step."""
    return packed([TOKENS] * B, vocab=vocab)[0].view(B, TOKENS).T.contiguous()


@torch.no_grad()
@pytest.mark.parametrize("name", ["dense", *FIXED])
def test_fixed_steps_are_the_steps_of_a_growing_cache(name, monkeypatch):
    model, asked = model_of(name).double(), []

    def watched(x, weight, kept):
        asked.append(kept.sum().item())
        return linear_of_kept(x, weight, kept)

    linear_of_kept = kept_op.linear_of_kept
    monkeypatch.setattr(linear.kept_op, "linear_of_kept", watched)
    step, cache = FixedStep(model, B, TOKENS), KVCache(model.config.steps, B)
    bounds = torch.arange(B + 1, dtype=torch.int32)
    for n, ids_B in enumerate(texts(23)):
        position_B = torch.full((B,), n, dtype=torch.int32)
        wanted = model(ids_B, position_B, bounds, cache=cache).logits_TV
        torch.testing.assert_close(step(ids_B, position_B), wanted, rtol=1e-5, atol=1e-6)
    assert step.length_LB.tolist() == [layer.lengths for layer in cache.layers]
    skipped = sum(TOKENS * B - sum(layer.lengths) for layer in cache.layers)
    assert (skipped > 0) == (name != "dense") and (0 in asked or name == "dense")


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("name", ["dense", *FIXED])
def test_one_graph_serves_every_decision(name):
    model = model_of(name, dim=64, kv_heads=4, vocab=200).cuda().bfloat16()
    position_B = torch.zeros(B, dtype=torch.int32, device="cuda")
    rows = texts(200).cuda()
    ids_B = rows[0].clone()
    eager, graphed = (FixedStep(model, B, TOKENS + 8) for _ in range(2))

    def step():
        logits_BV = graphed(ids_B, position_B)
        position_B.add_(1)
        return logits_BV

    replay = captured(step)
    graphed.length_LB.zero_()  # what came before the capture is forgotten
    for n, row_B in enumerate(rows):
        ids_B.copy_(row_B)
        position_B.fill_(n)
        wanted = eager(row_B, torch.full_like(position_B, n))
        assert torch.equal(replay(), wanted)
    assert torch.equal(graphed.length_LB, eager.length_LB)
    assert bool((eager.length_LB == TOKENS).all()) == (name == "dense")


def test_what_changes_its_shape_is_refused():
    routing = RoutingConfig(kind="halt", every=1, first=0)
    with pytest.raises(ConfigError, match=r"routing\.kind=halt: tokens leave; want skip"):
        FixedStep(small_model(None, routing=routing), 1, 8)
    routing = RoutingConfig(kind="skip", every=1, first=0)
    with pytest.raises(ConfigError, match=r"model\.moe beside model\.routing"):
        FixedStep(small_model({}, routing=routing), 1, 8)
