"""A whole MoE layer, forward and backward, alone and on several ranks, with its parts."""

from typing import Any

import torch
import torch.distributed as dist

from benchmarks.dispatch_measure import Run, chosen_by, slowest
from benchmarks.dispatch_ranks import Ranks
from moe_router import MoE, MoEConfig
from moe_router.dispatch import AllToAll, Bounded
from moe_router.dispatch.base import Dispatcher
from moe_router.dispatch.cost_model import Link
from moe_router.dispatch.transports import NAMES, make_transport

# what a kernel of this name does; what is in no list is `other`: casts, sums, zeros, the loss
PARTS = {
    "experts": ("_rows_kernel", "_weights_kernel", "_tile_table_kernel", "gemm", "cutlass"),
    "link": ("nccl", "_put_kernel", "_meet_kernel"),
    "rows": ("_move_kernel", "_combine_kernel", "_combine_backward_kernel"),
    "routing": (
        "_gate_kernel", "_gate_backward_kernel", "_rank_kernel", "_scan", "_place_kernel",
        "_find_kernel", "_lay_out_kernel",
    ),
    "copies": ("Memcpy", "Memset", "copy_kernel", "CatArray"),
}  # fmt: skip


def measure_layer(
    device: torch.device, shape: tuple[int, ...], samples: int, ranks: Ranks, link: Link | None
) -> dict[str, Any]:
    """Medians by name, us, alone and by each transport; and what the GPU did meanwhile.

    Args:
        shape: tokens of a rank, D, F, E, K.
    """
    T, D, F, E, K = shape
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    took: dict[str, float] = {}
    parts: dict[str, dict[str, float]] = {}
    reasons: dict[str, str] = {}
    for name in ("alone", *NAMES):

        def measured(name: str = name) -> tuple[float, dict[str, float]]:
            run = _step(name, shape, device, dtype)
            of = sorted(slowest(run, device, samples))
            return of[len(of) // 2], _parts(run, device)

        found, reason = ranks.attempt(name, measured)
        if found is None:
            reasons[name] = reason
        else:
            took[name], parts[name] = found
        if device.type == "cuda":
            torch.cuda.empty_cache()  # each holds its own weights
    ranks.at_work("")
    flops = 18 * T * K * D * F
    rates = {name: round(flops / micros / 1e6, 1) for name, micros in took.items()}
    chosen = chosen_by(link, (T, D, K, E))
    return {
        "chosen": chosen, "medians": took, "parts": parts, "reasons": reasons, "tflop_s": rates,
    }  # fmt: skip


def _step(name: str, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Run:
    """Forward and backward of a layer whose gradients are thrown away."""
    T, D, F, E, K = shape
    dispatcher: Dispatcher | None = None
    if name != "alone":
        dispatcher = Bounded(make_transport(name, T, 2.0, timeout_s=20), AllToAll())
    config = MoEConfig(experts=E, top_k=K, hidden=F, balance_loss=0.01)
    torch.manual_seed(dist.get_rank())
    with device:
        moe = MoE(D, config, dispatcher=dispatcher).to(dtype)
    x_TD = torch.randn(T, D, device=device, dtype=dtype, requires_grad=True)
    grad_TD = torch.randn(T, D, device=device, dtype=dtype)

    def run() -> None:
        for leaf in (x_TD, *moe.parameters()):
            leaf.grad = None
        routed = moe(x_TD)
        torch.autograd.backward([routed.delta_TD, moe.aux_loss(routed.choice)], [grad_TD, None])

    return run


def _parts(run: Run, device: torch.device) -> dict[str, float]:
    """Microseconds of this GPU by kind of kernel, of one run; on a CPU nothing tells them apart."""
    if device.type != "cuda":
        return {}
    torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize(device)
    found = dict.fromkeys([*PARTS, "other"], 0.0)
    for event in profile.key_averages():
        kind = next(
            (k for k, words in PARTS.items() if any(w in event.key for w in words)), "other"
        )
        found[kind] += event.self_device_time_total
    return {kind: round(micros, 1) for kind, micros in found.items()}
