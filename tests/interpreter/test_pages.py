"""A paged cache by Triton against its specification, on a GPU or interpreted."""

import os

import pytest
import torch

from moe_router_kernels import paged_op, reference_pages
from tests.interpreter.poison import poisoned

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton")
paged_attention = pytest.importorskip("moe_router_kernels.paged_attention")
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32] if INTERPRETED else [torch.float32, torch.float16, torch.bfloat16]
ERROR = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}


def table_of(lengths, page, width, generator):
    """Pages of each sequence, in no order; those past its length are page 0."""
    counts = [-(-n // page) for n in lengths]
    order = (1 + torch.randperm(sum(counts), generator=generator)).int().tolist()
    rows = [[order.pop() for _ in range(n)] + [0] * (width - n) for n in counts]
    return torch.tensor(rows, dtype=torch.int32, device=DEVICE), 1 + sum(counts)


def ints(values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "lengths, H, J, C, page, width",
    [
        ([1, 16, 17, 70, 5], 4, 2, 16, 16, 5),
        ([300], 8, 1, 32, 32, 40),  # shared by several programs, most of them idle
        ([33, 64], 3, 3, 64, 16, 6),
        ([7, 129], 24, 1, 128, 64, 3),
    ],
)
def test_queries_attend_to_the_slots_they_see_and_to_no_others(
    lengths, H, J, C, page, width, dtype
):
    generator = torch.Generator().manual_seed(sum(lengths))
    table_BM, pages = table_of(lengths, page, width, generator)
    row_T = ints([*reversed(range(len(lengths))), 0])
    seen_T = ints([*reversed(lengths), max(lengths[0] - 1, 1)])
    filled = torch.randn(2, pages, J, page, C, generator=generator).to(DEVICE, dtype)
    filled[:, 0] = torch.nan
    for b, n in enumerate(lengths):  # what lies past a length is another's
        filled[:, table_BM[b, (n - 1) // page], :, (n - 1) % page + 1 :] = torch.nan
    q_THC = torch.randn(len(row_T), H, C, generator=generator).to(DEVICE, dtype)
    wanted = reference_pages.attend(q_THC.double(), filled.double(), table_BM, row_T, seen_T)
    assert wanted.isfinite().all()
    with poisoned():
        got = paged_op.attend_pages(q_THC, filled, table_BM, row_T, seen_T, "triton")
    error = (got.double() - wanted).norm() / wanted.norm()
    assert got.dtype == dtype and error < ERROR[dtype]


def test_any_split_gives_the_same_sums(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    table_BM, pages = table_of([90, 31], 16, 8, generator)
    filled = torch.randn(2, pages, 2, 16, 16, generator=generator).to(DEVICE)
    q_THC = torch.randn(2, 4, 16, generator=generator).to(DEVICE)
    results = []
    for n in (1, 2, 8, 64):
        monkeypatch.setattr(paged_attention, "splits", lambda *_, n=n: n)
        results.append(
            paged_op.attend_pages(q_THC, filled, table_BM, ints([0, 1]), ints([90, 31]), "triton")
        )
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-5, atol=1e-6)


def test_splits_fill_the_device_and_no_more():
    assert paged_attention.splits(1, 4, 1024) == 64
    assert paged_attention.splits(1, 4, 5) == 4
    assert paged_attention.splits(16, 4, 1024) == 4
    assert paged_attention.splits(256, 4, 1024) == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("H, J, C, page", [(4, 2, 16, 16), (3, 1, 64, 32)])
def test_tokens_are_turned_and_stored_in_their_slots(H, J, C, page, dtype):
    generator = torch.Generator().manual_seed(C)
    table_BM, pages = table_of([page + 3, 2, 2 * page], page, 4, generator)
    row_T, slot_T = ints([0, 0, 1, 2, 2]), ints([page - 1, page, 1, 0, 2 * page - 1])
    x = [torch.randn(5, heads, C, generator=generator).to(DEVICE, dtype) for heads in (H, J, J)]
    turn = [torch.randn(5, 1, C, generator=generator).to(DEVICE) for _ in range(2)]
    results = []
    for kernels in ("reference", "triton"):
        cache = torch.full((2, pages, J, page, C), 7.0, device=DEVICE, dtype=dtype)
        with poisoned():
            q_THC, k_TJC = paged_op.store(*x, *turn, cache, table_BM, row_T, slot_T, kernels)
        results.append((q_THC, k_TJC, cache))
    for got, wanted in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, wanted)
    assert (results[1][2] != 7).sum() == 2 * 5 * J * C
