"""The kernels' table: what a row says, and that its checks can fail."""

import pytest
import torch

pytest.importorskip("triton")
from benchmarks import peers
from benchmarks.contest import Result, row
from benchmarks.kernel_rows import drawn_near
from benchmarks.kernel_shapes import LAYERS, names
from benchmarks.kernels import line_up
from benchmarks.layer_check import BOUND, Oracle, make_layer, saved_bytes
from benchmarks.peers import ours
from benchmarks.peers.base import Call, Layer, Limited, Peer, silu_times
from benchmarks.timing import Timing, summary
from moe_router_kernels import reference


def by_reference(layer: Layer, train: bool, interleaved: bool = False) -> Call:
    src_R, _, offsets_G1, row_TK = reference.plan(layer.ids_TK, layer.experts)
    x_TD, weight_TK, gate_up, down = leaves = layer.leaves(train)
    if interleaved:
        gate_up = leaves[2] = layer.interleaved().requires_grad_(train)

    def run() -> torch.Tensor:
        up_RF = reference.grouped_mm(x_TD[src_R.long()], gate_up.mT, offsets_G1)
        if interleaved:
            up_RF = torch.cat([up_RF[:, ::2], up_RF[:, 1::2]], 1)
        y_RD = reference.grouped_mm(silu_times(up_RF), down.mT, offsets_G1)
        return reference.combine(y_RD, weight_TK, row_TK)

    return Call(run, leaves, interleaved)


@pytest.fixture
def layer() -> Layer:
    return make_layer((40, 16, 24, 5, 2), device="cpu", dtype=torch.float32)


@pytest.mark.parametrize("interleaved", [False, True])
def test_the_oracle_takes_the_reference_in_either_order_of_weights(layer, interleaved):
    oracle = Oracle(layer)
    assert oracle.forward(by_reference(layer, False, interleaved)) < 1e-5
    assert oracle.backward(by_reference(layer, True, interleaved)) < 1e-5


@pytest.mark.parametrize("leaf", range(4))
def test_the_oracle_sees_a_wrong_gradient_of_any_leaf(layer, leaf):
    call = by_reference(layer, True)
    leaves = list(call.leaves)
    right = call.leaves[leaf]
    leaves[leaf] = torch.zeros_like(right).requires_grad_()

    def run() -> torch.Tensor:
        return call.run() + (leaves[leaf] * right.detach()).sum() * 0.5

    assert Oracle(layer).backward(Call(run, leaves)) > BOUND


def test_a_gradient_of_nan_does_not_pass(layer):
    call = by_reference(layer, True)
    call.leaves[3].register_hook(lambda grad: grad * torch.nan)
    assert not Oracle(layer).backward(call) < BOUND


def test_kept_bytes_leave_out_weights_and_count_a_storage_once(layer):
    x_TD, _, gate_up, _ = leaves = layer.leaves(True)
    call = Call(lambda: x_TD * x_TD + (gate_up[0] ** 2).sum(), leaves)
    assert saved_bytes(call) == x_TD.numel() * 4


def a_peer(name: str) -> Peer:
    return Peer(name, "no-such-distribution", "never run")


@pytest.mark.parametrize(
    "unit, ours, theirs, ratio", [("us", 10.0, 20.0, 2.0), ("TFLOP/s", 10.0, 20.0, 0.5)]
)
def test_a_ratio_above_one_is_better_and_an_absent_peer_is_named(unit, ours, theirs, ratio):
    field = {"moe_router": a_peer("moe_router"), "one": a_peer("One"), "gone": "not installed"}
    results = {
        "moe_router": Result(Timing(ours, ours + 1), "eager"),
        "one": Result(Timing(theirs, theirs), "eager"),
        "gone": Result(reason="not installed"),
    }

    def value(result: Result, slow: bool) -> float | None:
        return result.timing and (result.timing.p90 if slow else result.timing.median)

    one = row("name", unit, results, value, ceiling=1234.5, goal=None, peers=field)
    assert (one["value"], one["p90"], one["best_peer"]) == (ours, ours + 1, "One")
    assert one["ratio"] == ratio and one["ceiling"] == 1230 and one["correct"]
    assert one["peers"]["gone"] == {"reason": "not installed"}


def test_every_peer_is_lined_up_though_nothing_is_installed():
    found = line_up(list(peers.NAMES))
    assert list(found) == ["moe_router", *peers.NAMES]
    assert all(isinstance(peer, str | Peer) for peer in found.values())
    assert line_up([])["liger"] == "left out of this run"


def test_names_are_distinct_and_the_tail_is_the_slow_one():
    assert len(set(names())) == len(names()) == 38
    assert summary([float(n) for n in range(10, 0, -1)]) == Timing(5.5, 10.0)


def test_a_drawn_shape_is_near_its_neighbour_and_not_in_the_table():
    for shape in LAYERS:
        for seed in range(20):
            drawn = drawn_near(shape, seed)
            assert drawn not in LAYERS and drawn[-1] == shape[-1]
            for one, other, step in zip(drawn, shape, (8, 64, 32, 4), strict=False):
                assert one % step == 0 and other * 0.5 <= one <= other * 1.5


def test_ours_routes_in_groups_and_runs_the_whole_layer_from_x():
    torch.manual_seed(0)
    limited = Limited(torch.randn(30, 16), torch.randn(16) * 0.1, 4, groups=8, top_groups=4)
    ids_TK = ours.route_groups(limited)()
    assert ids_TK.shape == (30, 4) and ((ids_TK // 2).sort(1).values.diff() > 0).sum(1).max() <= 3
    layer = make_layer((12, 16, 24, 5, 2), device="cpu", dtype=torch.float32)
    assert ours.whole_layer(layer)().shape == (1, 12, 16)
