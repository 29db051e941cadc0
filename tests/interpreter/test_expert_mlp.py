"""The fused experts against the reference, on a GPU or in Triton's interpreter."""

import os
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from moe_router_kernels import reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton")
from moe_router_kernels import expert_op, fused_experts, grouped, plan_from_ids  # noqa: E402
from moe_router_kernels.expert_op import expert_mlp, expert_mlp_of_ids  # noqa: E402
from moe_router_kernels.permute import combine_rows  # noqa: E402
from moe_router_kernels.row_tiles import cut  # noqa: E402
from moe_router_kernels.tiles import Few, Tile  # noqa: E402
from tests.interpreter.poison import poisoned  # noqa: E402

DEVICE = "cpu" if INTERPRETED else "cuda"
# bf16 in the interpreter is wrong without a word, so it is for the GPU alone
DTYPES = [torch.float32] if INTERPRETED else [torch.float32, torch.float16, torch.bfloat16]
ERROR = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def routing(T, G, K, kind, generator):
    """(T, K) ids: distinct in a token, some missing; skewed onto few groups, or one alone."""
    score_TG = torch.rand(T, G, generator=generator)
    if kind == "skewed":
        score_TG = score_TG + 2 * (torch.arange(G) < max(K, G // 3))
    ids_TK = score_TG.argsort(1, descending=True)[:, :K].int()
    if kind == "hot":
        ids_TK[:, 1:], ids_TK[:, 0] = -1, G - 1
    if kind == "holes":
        ids_TK[torch.rand(T, K, generator=generator) < 0.4] = -1
    if kind == "none":
        ids_TK.fill_(-1)
    return ids_TK


def tensors(T, D, hidden, G, K, kind, dtype):
    generator = torch.Generator().manual_seed(T + D)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    x_TD, weight_TK = normal(T, D), torch.rand(T, K, generator=generator)
    gate_up, down = normal(G, 2 * hidden, D) * D**-0.5, normal(G, D, hidden) * hidden**-0.5
    plan = reference.plan(routing(T, G, K, kind, generator), G)
    leaves = [x_TD.to(dtype), weight_TK, gate_up.to(dtype), down.to(dtype)]
    return (
        [leaf.to(DEVICE).requires_grad_() for leaf in leaves],
        [part.to(DEVICE) for part in plan],
        normal(T, D).to(DEVICE, dtype),
    )


def oracle(leaves, plan):
    """The definition in fp64, expert by expert."""
    x_TD, weight_TK, gate_up, down = leaves
    src_R, _, offsets_G1, row_TK = plan
    rows_RD = x_TD[src_R.clamp(min=0).long()]
    gate, up = reference.grouped_mm(rows_RD, gate_up.mT, offsets_G1).chunk(2, -1)
    y_RD = reference.grouped_mm(F.silu(gate) * up, down.mT, offsets_G1)
    return reference.combine(y_RD, weight_TK, row_TK)


def error(one, other):
    scale = other.norm().clamp(min=1e-3)
    return float((one.detach().double() - other.detach().double()).norm() / scale.detach())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["uniform", "skewed", "hot", "holes", "none"])
@pytest.mark.parametrize(
    "T, D, hidden, G, K", [(1, 16, 8, 1, 1), (21, 32, 24, 5, 2), (70, 40, 56, 7, 3)]
)
def test_values_and_gradients_are_the_reference(T, D, hidden, G, K, kind, dtype):
    leaves, plan, grad_TD = tensors(T, D, hidden, G, K, kind, dtype)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    wanted = oracle(exact, plan)
    with poisoned():
        got = expert_mlp(*leaves, *plan)
        grads = torch.autograd.grad(got, leaves, grad_TD)
    assert got.dtype == dtype and error(got, wanted) < ERROR[dtype]
    wanted_grads = torch.autograd.grad(wanted, exact, grad_TD.double())
    for name, one, other in zip(
        ["x", "weight", "gate_up", "down"], grads, wanted_grads, strict=True
    ):
        assert one.isfinite().all() and error(one, other) < 2 * ERROR[dtype], name


def test_two_runs_are_equal_bit_by_bit_and_rows_do_not_see_each_other():
    leaves, plan, grad_TD = tensors(40, 32, 24, 5, 2, "uniform", DTYPES[-1])
    runs = []
    for _ in range(2):
        out = expert_mlp(*leaves, *plan)
        runs.append([out, *torch.autograd.grad(out, leaves, grad_TD)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    other = leaves[0].detach().clone()
    other[20:] = torch.randn_like(other[20:])
    assert torch.equal(expert_mlp(other, *leaves[1:], *plan)[:20], runs[0][0][:20])


def test_gradients_take_the_place_of_pre_activations_unless_the_graph_is_kept(monkeypatch):
    places, real = [], grouped.rows_times_groups

    def spy(*args, pre_RF=None, **kwargs):
        results = real(*args, pre_RF=pre_RF, **kwargs)
        if pre_RF is not None:
            places.append(results[0].data_ptr() == pre_RF.data_ptr())
        return results

    monkeypatch.setattr(grouped, "rows_times_groups", spy)
    leaves, plan, grad_TD = tensors(40, 32, 24, 5, 2, "holes", DTYPES[-1])
    out = expert_mlp(*leaves, *plan)
    first = torch.autograd.grad(out, leaves, grad_TD, retain_graph=True)
    second = torch.autograd.grad(out, leaves, grad_TD)
    assert places == [False, True]
    assert all(map(torch.equal, first, second))


def test_without_gradients_the_result_is_the_same_and_nothing_is_kept():
    leaves, plan, _ = tensors(40, 32, 24, 5, 2, "holes", DTYPES[-1])
    wanted = expert_mlp(*leaves, *plan)
    with torch.no_grad():
        assert torch.equal(expert_mlp(*leaves, *plan), wanted)
    detached = [leaf.detach() for leaf in leaves]
    assert torch.equal(expert_mlp(*detached, *plan), wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["uniform", "hot", "holes", "none"])
@pytest.mark.parametrize("T, D, hidden, G, K", [(1, 40, 24, 3, 2), (2, 72, 40, 20, 2)])
def test_few_rows_are_the_reference_and_see_no_others(T, D, hidden, G, K, kind, dtype, monkeypatch):
    monkeypatch.setattr(grouped, "rows_times_groups", None)  # matrices are no part of it
    for module in (fused_experts, expert_op):
        monkeypatch.setattr(module, "Few", partial(Few, span=16))
    leaves, plan, _ = tensors(T, D, hidden, G, K, kind, dtype)
    leaves = [leaf.detach() for leaf in leaves]
    ids_TK, row_TK = ids_of(plan, G), plan[3]
    with poisoned():
        got = expert_mlp(*leaves, *plan)
        by_ids = expert_mlp_of_ids(*leaves[:2], ids_TK, *leaves[2:])
    assert got.dtype == dtype and torch.equal(by_ids, got)
    assert error(got, oracle([leaf.double() for leaf in leaves], plan)) < ERROR[dtype]
    other = leaves[0].clone()
    other[1:] = torch.randn_like(other[1:])
    assert torch.equal(expert_mlp(other, *leaves[1:], *plan)[0], got[0])
    assert got[(row_TK < 0).all(1)].eq(0).all()


def ids_of(plan, G):
    """(T, K) int64 ids, of which what is none is past the last."""
    _, _, offsets_G1, row_TK = plan
    group_R = torch.searchsorted(offsets_G1[1:].long(), row_TK.long(), right=True)
    return torch.where(row_TK < 0, G + 2, group_R)


def test_by_ids_many_rows_and_gradients_go_by_a_plan():
    leaves, plan, grad_TD = tensors(40, 32, 24, 5, 2, "holes", DTYPES[-1])
    wanted = expert_mlp(*leaves, *plan)
    got = expert_mlp_of_ids(*leaves[:2], ids_of(plan, 5), *leaves[2:])
    assert torch.equal(got, wanted)
    one, other = (torch.autograd.grad(out, leaves, grad_TD) for out in (got, wanted))
    assert all(map(torch.equal, one, other))


def test_the_operation_keeps_to_what_its_fake_says():
    leaves, plan, _ = tensors(12, 32, 16, 4, 2, "uniform", torch.float32)
    cast = [leaf.detach() for leaf in leaves[2:]]
    torch.library.opcheck(expert_op._expert_mlp.op, (*leaves, *cast, *plan, True, False))
    x_TD, weight_TK, *cast = (leaf.detach() for leaf in leaves)
    torch.library.opcheck(expert_op._few_experts.op, (x_TD, weight_TK, ids_of(plan, 4), *cast))


@pytest.mark.parametrize(
    "which, shape, message",
    [
        (0, (12, 31), r"x_TD: got \(12, 31\) on .*, want \(12, 32\)"),
        (1, (12, 3), r"weight_TK: got \(12, 3\) on .*, want \(12, 2\)"),
        (2, (4, 31, 32), r"gate_up: got \(4, 31, 32\) on .*, want \(4, 30, 32\)"),
        (3, (5, 32, 16), r"down: got \(5, 32, 16\) on .*, want \(4, 32, 16\)"),
    ],
)
def test_what_does_not_fit_is_one_line(which, shape, message):
    leaves, plan, _ = tensors(12, 32, 16, 4, 2, "uniform", torch.float32)
    leaves[which] = torch.zeros(shape, device=DEVICE)
    with pytest.raises(ValueError, match=message):
        expert_mlp(*leaves, *plan)


def test_weights_of_fp32_get_gradients_of_fp32():
    leaves, plan, grad_TD = tensors(24, 32, 16, 4, 2, "uniform", torch.float32)
    x_TD = leaves[0].detach().to(DTYPES[-1])
    out = expert_mlp(x_TD, *leaves[1:], *plan)
    grads = torch.autograd.grad(out, leaves[1:], grad_TD.to(DTYPES[-1]))
    assert all(grad.dtype == torch.float32 for grad in grads)


def test_nothing_is_read_past_the_last_group():
    """Rows there are not written by the GEMM before, so they may hold anything."""
    leaves, plan, _ = tensors(30, 32, 16, 4, 2, "holes", torch.float32)
    src_R, _, offsets_G1, row_TK = plan
    tile = Tile(m=16, n=32, k=32, band=2, warps=4, stages=2)
    rows = cut(offsets_G1, src_R.numel(), tile.m)
    used = int(offsets_G1[-1])
    assert used < src_R.numel()
    act = torch.randn(src_R.numel(), 16, device=DEVICE)
    act[used:] = torch.nan
    y_RD, _, _ = grouped.rows_times_groups(act, leaves[3].detach(), rows, tile=tile)
    assert y_RD[:used].isfinite().all()
    y_RD[used:] = torch.nan
    assert combine_rows(y_RD, row_TK, leaves[1].detach()).isfinite().all()
    for gather, a, b in (("a", leaves[0], act), ("b", act, leaves[0])):
        weights = grouped.group_weights(
            a.detach(), b.detach(), offsets_G1, src_R=src_R, gather=gather,
            dtype=torch.float32, tile=tile,
        )  # fmt: skip
        assert weights.isfinite().all()


@pytest.mark.gpu
def test_more_elements_than_32_bits_count():
    """rows * 2 F is above 2^31: the last rows are right."""
    T, D, hidden, G, K = 1 << 17, 64, 1040, 8, 8
    generator = torch.Generator(DEVICE).manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device=DEVICE).bfloat16()

    leaves = [normal(T, D), torch.rand(T, K, device=DEVICE), normal(G, 2 * hidden, D) * D**-0.5]
    leaves = [leaf.requires_grad_() for leaf in (*leaves, normal(G, D, hidden) * hidden**-0.5)]
    target_TK = torch.arange(K, dtype=torch.int32, device=DEVICE).expand(T, K)
    plan = plan_from_ids(target_TK, G)
    assert plan[0].numel() * 2 * hidden > 1 << 31
    grad_TD = normal(T, D)
    got = expert_mlp(*leaves, *plan)
    grads = torch.autograd.grad(got, leaves, grad_TD)
    few = torch.arange(T - 40, T, device=DEVICE)
    some = [leaf.detach()[few] if i < 2 else leaf.detach() for i, leaf in enumerate(leaves)]
    some = [leaf.double().requires_grad_() for leaf in some]
    wanted = oracle(some, plan_from_ids(target_TK[few], G, "reference"))
    wanted_grads = torch.autograd.grad(wanted, some[:2], grad_TD[few].double())
    assert error(got[few], wanted) < ERROR[torch.bfloat16]
    for one, other in zip(grads[:2], wanted_grads, strict=True):
        assert error(one[few], other) < 2 * ERROR[torch.bfloat16]
