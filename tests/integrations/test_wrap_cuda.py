"""What is wrapped computes the same on a GPU, in 32 and in 16 bit, forward and backward; and
decodes with a cache there."""

import pytest
import torch

import moe_router
from moe_router.layers.trial import trial_loss
from tests.integrations import test_wrap, test_wrap_decoder, test_wrap_halt

pytestmark = pytest.mark.gpu
MADE = {
    "prune": lambda: moe_router.wrap(test_wrap.made(), kind="prune", keep=0.5),
    "attention": lambda: moe_router.wrap(test_wrap.made(), kind="prune", router="attention"),
    "merge": lambda: moe_router.wrap(test_wrap.made(), kind="merge", keep=0.6),
    "halt": lambda: test_wrap_halt.encoder("tsa"),
    "skip": lambda: test_wrap_decoder.wrapped(),
    "halt a decoder": lambda: test_wrap_halt.decoder("ponder"),
}


def inputs_of(kind, device):
    decodes = kind in ("skip", "halt a decoder")
    batch = (test_wrap_decoder if decodes else test_wrap).batch()
    return {name: x.to(device) for name, x in batch.items()}


@pytest.mark.parametrize("kind", MADE)
def test_the_gpu_computes_what_the_host_does(kind):
    got = []
    for device in ("cpu", "cuda"):
        model, inputs = MADE[kind]().to(device), inputs_of(kind, device)
        out = model(**inputs)[0][inputs["attention_mask"].bool()]
        if kind in ("halt", "halt a decoder"):
            out.square().sum().backward()
            got.append([p.grad.cpu() for p in model.parameters() if p.requires_grad])
        got.append(out.detach().cpu())
    half = len(got) // 2
    torch.testing.assert_close(got[:half], got[half:], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("kind", MADE)
def test_sixteen_bit_is_near(kind):
    """By torch's packed kernel. Decisions may differ where logits are close: most states agree."""
    outs = []
    for dtype in (torch.float32, torch.bfloat16):
        model, inputs = MADE[kind]().to("cuda", dtype), inputs_of(kind, "cuda")
        with torch.no_grad():
            outs.append(model(**inputs)[0][inputs["attention_mask"].bool()].float())
    near_T = torch.cosine_similarity(*outs, dim=-1)
    both_left_T = (outs[0] == 0).all(-1) & (outs[1] == 0).all(-1)
    assert ((near_T > 0.98) | both_left_T).float().mean() > 0.7


@pytest.mark.parametrize("kind", ["skip", "halt a decoder"])
def test_a_cache_changes_nothing(kind):
    model, inputs = MADE[kind]().to("cuda"), inputs_of(kind, "cuda")
    texts = [
        model.generate(**inputs, max_new_tokens=8, do_sample=False, use_cache=caches)
        for caches in (True, False)
    ]
    assert torch.equal(*texts)


def test_trials_teach_on_a_gpu():
    model, inputs = MADE["prune"]().to("cuda"), inputs_of("prune", "cuda")
    loss = trial_loss(model, lambda: model(**inputs).last_hidden_state.square().mean((1, 2)))
    loss.backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(grad is not None for grad in grads) and any(grad.abs().sum() > 0 for grad in grads)
