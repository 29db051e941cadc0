"""A pass with bounds gives what the model gives, whatever its routers do."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_router.config import ModelConfig, RoutingConfig
from moe_router.errors import ConfigError
from moe_router.models import CausalLM
from moe_router.models.bounded import BoundedPass, bucket_of
from moe_router.models.encoder import TextClassifier
from moe_router.models.packing import Packing
from tests.models.test_waits import gpu_waits

EARLY = {"router": "linear", "threshold": 0.7, "start": -0.5}
WAYS = {
    "tsa": RoutingConfig(kind="halt", every=1, first=0, halting="tsa", **EARLY),
    "act": RoutingConfig(kind="halt", every=1, first=0, halting="act", **EARLY),
    "ponder": RoutingConfig(kind="halt", every=1, first=0, halting="ponder", prior=0.3, **EARLY),
    "threshold": RoutingConfig(kind="prune", decide="threshold", threshold=0.5, first=0, every=1),
    "skip": RoutingConfig(kind="skip", keep=0.5, every=1, first=0),
    "leap": RoutingConfig(kind="leap", start=0.0, every=1, first=0),
}
LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=5).filter(sum)


def model_of(way, device="cpu", dtype=torch.float32):
    torch.manual_seed(1)
    causal = way in ("skip", "leap")
    config = ModelConfig(
        kind="causal_lm" if causal else "encoder", layers=4, dim=32, heads=2, kv_heads=2,
        hidden=48, moe=None, routing=WAYS[way],
    )  # fmt: skip
    model = CausalLM(config, 50) if causal else TextClassifier(config, 50, 3)
    for name, parameter in model.named_parameters():
        if "router" in name and parameter.dim() > 1:  # decisions that differ between tokens
            torch.nn.init.normal_(parameter, std=1.0)
    return model.eval().to(device, dtype)


def batch_of(lengths, seed, device="cpu"):
    ids = torch.randint(50, (sum(lengths),), generator=torch.Generator().manual_seed(seed))
    position = torch.cat([torch.arange(n, dtype=torch.int32) for n in lengths])
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    return ids.to(device), position.to(device), offsets


@settings(max_examples=12, deadline=None)
@given(st.sampled_from(sorted(WAYS)), st.lists(LENGTHS, min_size=2, max_size=4))
def test_a_bounded_pass_is_the_pass(way, batches):
    model = model_of(way)
    bounded = BoundedPass(model)
    for seed, lengths in enumerate(batches):
        batch = batch_of(lengths, seed)
        with torch.no_grad():
            wanted = model(*batch).logits
        torch.testing.assert_close(bounded(*batch), wanted, rtol=1e-4, atol=1e-5)


def test_rows_past_a_bound_are_made_again(monkeypatch):
    model = model_of("skip")
    bounded = BoundedPass(model)
    few, many = batch_of([90, 80], 0), batch_of([100, 99], 1)
    bounded(*few)
    bounded._shares = [0.1 for _ in bounded._shares]
    with torch.no_grad():
        wanted = model(*many).logits
    torch.testing.assert_close(bounded(*many), wanted, rtol=1e-4, atol=1e-5)
    assert bounded.repeated == 1
    torch.testing.assert_close(bounded(*many), wanted, rtol=1e-4, atol=1e-5)
    assert bounded.repeated == 1  # bounds have grown


def test_rows_of_no_token_are_never_read(monkeypatch):
    model = model_of("tsa")
    bounded, batch = BoundedPass(model), batch_of([30, 17, 25], 2)
    bounded(*batch)
    taken = Packing.bounded
    seen = []

    def poisoned(offsets, rows, *more, **words):
        seen.append((rows, int(offsets[-1])))
        return taken(offsets, rows, *more, **words)

    monkeypatch.setattr(Packing, "bounded", poisoned)
    embedded = model.embed.weight.clone()
    with torch.no_grad():
        model.embed.weight[0] = torch.nan  # what rows that are left over hold
        ids = batch[0].clamp(min=1)
        wanted = model(ids, *batch[1:]).logits
        torch.testing.assert_close(bounded(ids, *batch[1:]), wanted, rtol=1e-4, atol=1e-5)
        model.embed.weight.copy_(embedded)
    assert seen and all(rows >= there for rows, there in seen)
    assert any(rows > there for rows, there in seen)


@pytest.mark.parametrize("size, bucket", [(0, 0), (1, 8), (64, 64), (65, 80), (1000, 1024)])
def test_sizes_that_are_prepared(size, bucket):
    assert bucket_of(size) == bucket


def test_a_model_in_training_is_refused():
    model = model_of("skip")
    bounded = BoundedPass(model)
    model.train()
    with pytest.raises(
        ConfigError, match=r"^bounded pass: the model is in training; call model\.ev"
    ):
        bounded(*batch_of([3, 4], 0))


def test_a_model_whose_rows_the_host_knows_is_refused():
    config = ModelConfig(kind="encoder", layers=2, dim=32, heads=2, kv_heads=2, hidden=48, moe=None)
    with pytest.raises(ConfigError, match="call the model itself"):
        BoundedPass(TextClassifier(config, 50, 3))


@pytest.mark.gpu
@pytest.mark.parametrize("way", sorted(WAYS))
def test_one_graph_for_batches_of_a_size_on_a_gpu(way):
    model = model_of(way, "cuda", torch.bfloat16)
    bounded = BoundedPass(model)
    for seed, lengths in enumerate([[300, 200, 7], [280, 210, 5], [290, 0, 199], [1, 1, 1]]):
        batch = batch_of(lengths, seed, "cuda")
        with torch.no_grad():
            wanted = model(*batch).logits
        got = bounded(*batch)
        torch.testing.assert_close(got, wanted, rtol=2e-2, atol=2e-2)
    assert any(ready.graph is not None for ready in bounded._prepared.values())
    bounded(*batch)
    assert len(gpu_waits(lambda: bounded(*batch))) == 1
