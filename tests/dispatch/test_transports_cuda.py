"""Every transport on two GPUs equals `local`; the static ones never wait and can be captured.

Peer memory is tested on one GPU too, by two processes that share it: they take turns, so it is
slow, but the kernels, the flags and the symmetric memory are the real ones.
"""

import time

import pytest
import torch
import torch.distributed as dist

from moe_router.config import MoEConfig
from moe_router.dispatch import PeerMemory
from moe_router.dispatch.transports import round_trip
from moe_router.layers.moe import MoE
from moe_router.placement import Placement
from moe_router.routing.plan import plan_from_ids
from moe_router.types import Choice
from tests.dispatch import work
from tests.dispatch.test_transports import ROUTINGS, assert_equals_local
from tests.gloo import run_ranks

pytestmark = pytest.mark.gpu
GPUS = torch.cuda.device_count()
BACKEND = "nccl" if GPUS > 1 else "gloo"
two_gpus = pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")


def on(names):
    return [pytest.param(n, marks=() if n == "peer_memory" else two_gpus) for n in names]


def own_gpu(rank):
    return torch.device("cuda", rank % torch.cuda.device_count())


def on_gpu(rank, ranks, name, cases):
    return work.move_parts(rank, ranks, name, cases, device=own_gpu(rank))


@pytest.mark.parametrize("name", on(work.TRANSPORTS))
def test_equals_local(name):
    cases = [(*routing, 2, torch.float32) for routing in ROUTINGS.values()]
    parts_of = zip(*run_ranks(2, on_gpu, name, cases, backend=BACKEND), strict=True)
    for case, parts in zip(cases, parts_of, strict=True):
        assert not any(part["overflow"] for part in parts), case
        assert_equals_local(parts, work.move_whole(*case), case[1], rtol=2e-4, atol=2e-5)


def captured(rank, ranks, name):
    """A round trip that never waits, and the replay of its CUDA graph on other tokens."""
    device, (T, D, K, E) = own_gpu(rank), (96, 64, 4, 16)
    by = work.transport(name, (0, T))
    torch.manual_seed(rank)
    x_TD = torch.randn(T, D, device=device, dtype=torch.bfloat16)
    target_TK = torch.rand(T, E, device=device).topk(K).indices.int()
    choice = Choice(target_TK, torch.ones(T, K, device=device))
    placement, plan = Placement.contiguous(E, ranks), plan_from_ids(target_TK, E)

    def run():
        return round_trip(by, x_TD, choice, plan, placement)[0]

    with torch.no_grad():
        run()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            out_TD = run()
        x_TD.neg_()
        graph.replay()
        torch.cuda.synchronize()
        return torch.equal(out_TD, run())


@pytest.mark.parametrize("name", on(name for name in work.TRANSPORTS if name != "all_to_all"))
def test_a_static_transport_never_waits_and_can_be_captured(name):
    assert run_ranks(2, captured, name, backend=BACKEND) == [True, True]


def deserted(rank, ranks):
    """Rank 1 stays away from two round trips: whether rank 0 was told, and after how long; then a
    new transport of both, in the same processes."""
    device = own_gpu(rank)
    placement, target_TK = Placement.contiguous(4, ranks), torch.arange(8).view(4, 2).int() % 4
    choice = Choice(target_TK.to(device), torch.ones(4, 2, device=device))
    inputs = (choice, plan_from_ids(choice.target_TK, 4), placement)
    x_TD = torch.arange(32.0, device=device).view(4, 8)

    def trip(by):
        out_TD, overflow = round_trip(by, x_TD, *inputs)
        torch.cuda.synchronize()
        return bool(overflow), torch.equal(out_TD, x_TD)

    with torch.no_grad():
        by = PeerMemory(4, timeout_s=0.5)
        found = [trip(by)]
        began = time.monotonic()
        if rank == 0:
            found += [trip(by), trip(by)]
        seconds = time.monotonic() - began
        dist.barrier()
        return found, trip(PeerMemory(4, timeout_s=20)), seconds


def test_a_peer_that_stays_away_is_told_and_traps_nobody():
    (alone, after, seconds), (_, other, _) = run_ranks(2, deserted, backend=BACKEND)
    assert alone[0] == after == other == (False, True)
    assert [lost for lost, _ in alone[1:]] == [True, True]
    assert seconds < 10


def wide(rank, ranks):
    """Whether five round trips of many rows of a model's width were exact."""
    device, (T, D, K, E) = own_gpu(rank), (1500, 7168, 8, 256)
    torch.manual_seed(rank)
    x_TD = torch.randn(T, D, device=device, dtype=torch.bfloat16)
    target_TK = torch.rand(T, E, device=device).topk(K).indices.int()
    choice, plan = Choice(target_TK, torch.rand(T, K, device=device)), plan_from_ids(target_TK, E)
    ranks_T = (target_TK // (E // ranks)).sort(1).values.diff(dim=1).ne(0).sum(1) + 1
    by, exact = PeerMemory(T, timeout_s=20), []
    with torch.no_grad():
        for _ in range(5):
            out_TD, overflow = round_trip(by, x_TD, choice, plan, Placement.contiguous(E, ranks))
            exact.append(torch.equal(out_TD, x_TD * ranks_T[:, None]) and not overflow)
            x_TD = x_TD.neg()
    return exact


def test_many_wide_rows_come_back_exactly():
    assert run_ranks(2, wide, backend=BACKEND) == [[True] * 5] * 2


def beside(rank, ranks):
    """How far a layer whose shared expert runs while rows travel is from one of one rank, and
    whether it repeats bit by bit."""
    device = own_gpu(rank)
    config = MoEConfig(experts=8, top_k=2, hidden=128, shared_hidden=256)
    torch.manual_seed(0)
    whole = MoE(256, config).to(device)
    placement = Placement.contiguous(8, ranks)
    ours = work.shard(whole, placement, rank, PeerMemory(512, timeout_s=20)).to(device)
    torch.manual_seed(1 + rank)
    x_TD, grad_TD = torch.randn(2, 512, 256, device=device)
    found = []
    for layer in (whole, *[ours] * 5):
        x_leaf_TD = x_TD.clone().requires_grad_()
        routed = layer(x_leaf_TD)
        routed.delta_TD.backward(grad_TD)
        found.append((routed.delta_TD.detach(), x_leaf_TD.grad))
    wanted, first, *again = found
    far = max(float((a - b).abs().max()) for a, b in zip(first, wanted, strict=True))
    return far, all(torch.equal(a, b) for more in again for a, b in zip(first, more, strict=True))


def test_a_shared_expert_beside_travelling_rows_changes_nothing():
    for far, repeats in run_ranks(2, beside, backend=BACKEND):
        assert far < 1e-3 and repeats  # fp32 products may be TF32
