"""Routed attention of models on a GPU, by its kernels, against the same on the CPU."""

import pytest
import torch

from moe_router.config import AttentionConfig
from moe_router.models import KVCache
from tests.models.helpers import packed, small_model

pytestmark = pytest.mark.gpu
LENGTHS = [330, 1, 0, 200]


def model_with(**how):
    config = AttentionConfig(kind="routed", **{"block": 16, "top_k": 4, "window": 16} | how)
    sizes = {"dim": 64, "heads": 4, "kv_heads": 2, "hidden": 64, "std": 3.0}
    return small_model(attention=config, vocab=400, **sizes)


CLUSTERS = {"select": "clusters", "router": "linear", "clusters": 4, "global_tokens": 2}


@pytest.mark.parametrize("how", [{}, {"gated": True}, CLUSTERS, CLUSTERS | {"gated": True}])
def test_values_and_gradients_are_those_of_the_cpu(how):
    batch, results = packed(LENGTHS, vocab=400), []
    for device in ("cpu", "cuda"):
        model = model_with(**how).to(device)
        out = model(*(x.to(device) for x in batch[:2]), batch[2]).logits_TV
        grads = torch.autograd.grad(out.square().sum(), [*model.parameters()])
        results.append([x.detach().cpu() for x in (out, *grads)])
    for ours, wanted in zip(*reversed(results), strict=True):
        assert (ours - wanted).norm() < 1e-3 * wanted.norm()


@pytest.mark.parametrize("how", [{}, CLUSTERS])
def test_a_suffix_changes_nothing_before_it_in_16_bit(how):
    model = model_with(**how).cuda().bfloat16().eval()
    ids, position, offsets = (x.cuda() for x in packed([330], vocab=400))
    with torch.no_grad():
        before = model(ids, position, offsets.cpu()).logits_TV
        ids[150:] = ids[150:].flip(0)
        after = model(ids, position, offsets.cpu()).logits_TV
    assert torch.equal(after[:150], before[:150]) and not torch.equal(after[150:], before[150:])


@pytest.mark.parametrize("how", [{"gated": True}, CLUSTERS])
def test_decoding_is_one_pass_over_the_text(how):
    model = model_with(**how).cuda().eval()
    ids, position, _ = (x.cuda() for x in packed([100], vocab=400))
    cache, got = KVCache(3, 1), []
    with torch.no_grad():
        wanted = model(ids, position, torch.tensor([0, 100])).logits_TV
        for start, end in ((0, 70), *((t, t + 1) for t in range(70, 100))):
            part = (ids[start:end], position[start:end], torch.tensor([0, end - start]))
            got.append(model(*part, cache=cache).logits_TV)
    torch.testing.assert_close(torch.cat(got), wanted, rtol=1e-3, atol=1e-3)
