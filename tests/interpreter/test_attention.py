"""Attention to chosen blocks by Triton against the masked oracle, on a GPU or interpreted."""

import os

import pytest
import torch

from benchmarks.attention_cases import Case, Shape
from benchmarks.attention_tiles import measure_tile
from moe_router_kernels import attention_op, reference_attention
from tests.interpreter.poison import poisoned

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton")

from moe_router_kernels.block_attention import TILES  # noqa: E402

DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32] if INTERPRETED else [torch.float32, torch.float16, torch.bfloat16]
ERROR = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}


def cut(lengths, block):
    """First and last token of each block of packed sequences, and the sequence of each."""
    first, last, sequence, start = [], [], [], 0
    for s, length in enumerate(lengths):
        for at in range(0, length, block):
            first.append(start + at)
            last.append(start + min(at + block, length))
            sequence.append(s)
        start += length
    ints = (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in (first, last))
    return *ints, sequence


def choice(sequence, J, K, generator):
    """Each query block takes its own, and earlier ones of its sequence at random."""
    target = torch.full((len(sequence), J, K), -1, dtype=torch.int32)
    for n, s in enumerate(sequence):
        earlier = [m for m in range(n) if sequence[m] == s]
        for j in range(J):
            order = torch.randperm(len(earlier), generator=generator)[: K - 1].tolist()
            picked = [n, *(earlier[i] for i in order)]
            target[n, j, : len(picked)] = torch.tensor(picked, dtype=torch.int32)
    return target.to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "lengths, H, J, d, block, K",
    [([40], 2, 1, 16, 16, 2), ([5, 0, 33, 16], 4, 2, 32, 16, 2), ([70], 2, 2, 16, 32, 9)],
)
@pytest.mark.parametrize("causal, gated", [(True, False), (True, True), (False, True)])
@pytest.mark.parametrize("tiles", ["wide", "narrow"])
def test_values_and_gradients_are_the_oracles(
    lengths, H, J, d, block, K, causal, gated, tiles, dtype
):
    generator = torch.Generator().manual_seed(sum(lengths))
    T = sum(lengths)
    first_N, last_N, sequence = cut(lengths, block)
    target_NJK = choice(sequence, J, K, generator)
    leaves = [
        torch.randn(T, heads, d, generator=generator).to(DEVICE, dtype).requires_grad_()
        for heads in (H, J, J)
    ]
    grad_THd = torch.randn(T, H, d, generator=generator).to(DEVICE)
    if gated:
        gate_NJK = torch.rand(target_NJK.shape, generator=generator).to(DEVICE)
        leaves.append(gate_NJK.requires_grad_())
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    lists = (first_N, last_N, target_NJK)
    wanted = reference_attention.attend_blocks(*exact[:3], *lists, *exact[3:], causal=causal)
    wanted_grads = torch.autograd.grad(wanted, exact, grad_THd.double())
    with poisoned():
        got = attention_op.attend_blocks(
            *leaves[:3], *lists, block, gate_NJK=leaves[3] if gated else None, causal=causal,
            kernels="triton", tiles=tiles,
        )  # fmt: skip
        grads = torch.autograd.grad(got, leaves, grad_THd.to(dtype))
    results = zip((got, *grads), (wanted, *wanted_grads), (leaves[0], *leaves), strict=True)
    for one, other, like in results:
        error = (one.double() - other).norm() / other.norm()
        assert one.dtype == like.dtype and error < ERROR[dtype]


def test_two_runs_are_equal_bit_by_bit_and_a_suffix_changes_nothing_before_it():
    generator = torch.Generator().manual_seed(0)
    first_N, last_N, sequence = cut([50], 16)
    lists = (first_N, last_N, choice(sequence, 2, 2, generator))
    q, k, v = (torch.randn(50, heads, 16, generator=generator).to(DEVICE) for heads in (4, 2, 2))
    runs = [attention_op.attend_blocks(q, k, v, *lists, 16, kernels="triton") for _ in range(2)]
    assert torch.equal(*runs)
    k[40:], v[40:] = torch.randn_like(k[40:]), torch.randn_like(v[40:])
    changed = attention_op.attend_blocks(q, k, v, *lists, 16, kernels="triton")
    assert torch.equal(changed[:40], runs[0][:40]) and not torch.equal(changed[40:], runs[0][40:])


def test_the_operation_keeps_to_what_its_fake_says():
    generator = torch.Generator().manual_seed(0)
    first_N, last_N, sequence = cut([20], 16)
    target_NJK = choice(sequence, 1, 2, generator)
    easy_NJK = attention_op.unmasked(first_N, last_N, target_NJK, 16, True)
    target_NJK, count_NJ2, _ = attention_op.by_mask(target_NJK, easy_NJK)
    assert target_NJK.tolist() == [[[0, -1]], [[0, 1]]]
    assert count_NJ2.tolist() == [[[0, 1]], [[1, 2]]]
    groups = attention_op.by_key(target_NJK, count_NJ2, last_N - first_N == 16, "reference")
    gate_NJK = torch.rand(2, 1, 2, device=DEVICE)
    leaves = [torch.randn(20, 1, 16, device=DEVICE) for _ in range(3)] + [gate_NJK]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    lists = (first_N, last_N, target_NJK, count_NJ2, *groups)
    torch.library.opcheck(attention_op._attend.op, (*leaves, *lists, 16, True, "auto"))


def test_each_tile_can_be_timed():
    shape = Shape("top2", 48, heads=2, kv_heads=1, channels=16, block=16)
    case = Case(shape, torch.device(DEVICE))
    for name in TILES["keys"]:
        row = measure_tile(case, f"tiles/keys/{name}/top2/T48")
        assert row["us"] > 0 and row["cut"] == str(TILES["keys"][name])
    for kernel in ("forward", "queries"):
        assert measure_tile(case, f"tiles/{kernel}/wide/top2/T48")["us"] > 0
