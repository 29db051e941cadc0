"""Attention inside clusters by the block-sparse Triton kernels, on a GPU or interpreted."""

import os

import pytest
import torch

from moe_router_kernels import reference_attention
from moe_router_kernels.cluster_attention import attend_clusters, sort_by_cluster
from moe_router_kernels.near_attention import Band
from tests.interpreter.poison import poisoned

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton")

DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32] if INTERPRETED else [torch.float32, torch.bfloat16]
ERROR = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "first, last, low, clusters, window, global_tokens",
    [
        ([0, 16, 32, 48], [16, 32, 48, 60], [0, 0, 0, 0], 2, 5, 1),
        ([0, 5, 21], [5, 21, 30], [0, 5, 5], 3, 0, 0),  # lengths 5, 0, 25; one cluster is empty
    ],
)
def test_values_and_gradients_are_the_oracles(
    first, last, low, clusters, window, global_tokens, dtype
):
    generator = torch.Generator().manual_seed(0)
    T, J, block = last[-1], 2, 16
    ints = [torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in (first, last, low)]
    offsets = torch.tensor([0, T] if low[-1] == 0 else [0, 5, 5, T], dtype=torch.int32).to(DEVICE)
    leaves = [torch.randn(T, heads, 16, generator=generator) for heads in (4, J, J)]
    leaves.append(torch.rand(T, J, generator=generator) + 0.5)
    leaves = [x.to(DEVICE, dtype if i < 3 else None).requires_grad_() for i, x in enumerate(leaves)]
    high = clusters if window else clusters - 1
    cluster_TJ = torch.randint(high, (T, J), generator=generator, dtype=torch.int32).to(DEVICE)
    grad_THd = torch.randn(T, 4, 16, generator=generator).to(DEVICE)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    how = (offsets, cluster_TJ, exact[3], window, global_tokens)
    wanted = reference_attention.attend_clusters(*exact[:3], *how)
    wanted_grads = torch.autograd.grad(wanted, exact, grad_THd.double())
    longest = int(offsets.diff().max())
    with poisoned():
        rows = sort_by_cluster(offsets, cluster_TJ, clusters, block, longest, "triton")
        assert rows.last_N[-1] == rows.first_N[-1] == T * J  # no block: as many as there may be
        band = Band(*ints, block, window, global_tokens, T) if window else None
        lists = (cluster_TJ, leaves[3], rows, band, block)
        got = attend_clusters(*leaves[:3], *lists, kernels="triton")
        grads = torch.autograd.grad(got, leaves, grad_THd.to(dtype))
    for one, other in zip((got, *grads), (wanted, *wanted_grads), strict=True):
        error = (one.double() - other).norm() / other.norm()
        assert error < ERROR[dtype]
