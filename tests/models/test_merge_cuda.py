"""Merging on a GPU: sizes reach the packed kernel, and nothing waits for the device."""

import pytest
import torch

from moe_router.config import RoutingConfig
from moe_router.models.attend import attend_packed
from moe_router.models.packing import Packing
from tests.models.helpers import packed, small_model
from tests.models.test_merge import LENGTHS

pytestmark = pytest.mark.gpu


def test_the_packed_kernel_sees_sizes_as_the_mask_does():
    generator = torch.Generator().manual_seed(0)
    lengths = [4, 1, 60, 300]
    T = sum(lengths)
    q, k, v = (torch.randn(T, n, 32, generator=generator) for n in (4, 2, 2))
    size_T = torch.randint(1, 9, (T,), generator=generator).float()
    offsets_B1 = torch.tensor([0, *lengths]).cumsum(0).int()
    on_cpu = Packing(offsets_B1, torch.device("cpu"), causal=False)
    wanted = attend_packed(q, k, v, on_cpu, size_T)
    packing = Packing(offsets_B1, torch.device("cuda"), causal=False)
    half = (x.cuda().bfloat16() for x in (q, k, v))
    ours = attend_packed(*half, packing, size_T.cuda())
    torch.testing.assert_close(ours.float().cpu(), wanted, rtol=5e-2, atol=3e-2)


@pytest.mark.parametrize("kind", ["merge", "prune"])
def test_a_step_never_waits_for_the_device(kind):
    """How many tokens stay is known to the host: keep times the lengths."""
    routing = RoutingConfig(kind=kind, keep=0.6, every=1, first=0)
    model = small_model(None, routing=routing, dim=32, classes=3).cuda().bfloat16()
    ids_T, position_T, offsets_B1 = packed(LENGTHS)
    batch = ids_T.cuda(), position_T.cuda(), offsets_B1

    def step():
        model(*batch).logits_BC.sum().backward()

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert model.embed.weight.grad.isfinite().all()
