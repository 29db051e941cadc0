"""Where the Triton kernels run, and calls that import them on first use: not every machine has
Triton, and its import takes time."""

import importlib.util
import os
from functools import cache

import torch
from torch import Tensor


def runs_triton(device: torch.device) -> bool:
    """Whether the Triton kernels run on tensors of this device: compiled, or interpreted."""
    if not _has_triton():
        return False
    return device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def limits_groups(groups: int, experts: int, expert_groups: int) -> bool:
    """Whether the fused gate limits the choice to groups of neighbouring experts: it reshapes.

    Args:
        groups: G, null experts included.
    """
    whole = groups == experts and experts & (experts - 1) == 0
    even = expert_groups & (expert_groups - 1) == 0 and experts // expert_groups >= 2
    return expert_groups == 1 or (whole and even)


def gate_and_plan(
    logits_TG: Tensor,
    k: int,
    *,
    experts: int,
    score: str,
    bias_E: Tensor | None,
    expert_groups: int = 1,
    top_groups: int = 1,
) -> dict[str, Tensor]:
    """`fused.gate_and_plan`.

    Args:
        logits_TG: (T, G) fp32 on a device for which `runs_triton` holds.
        bias_E: (experts,) fp32 or None.
        expert_groups, top_groups: where `limits_groups` holds.

    Returns:
        target_TK int32 (-1 for a null choice), load_G int32, and a dropless Plan over the experts:
        src_R, choice_R, offsets_G1, row_TK int32.
    """
    from moe_router_kernels import fused

    return fused.gate_and_plan(
        logits_TG.detach().contiguous(),
        k,
        experts=experts,
        score=score,
        bias_E=bias_E,
        expert_groups=expert_groups,
        top_groups=top_groups,
    )


def runs_expert_mlp(kernels: str, x_TD: Tensor, gate_up: Tensor, src_R: Tensor) -> bool:
    """Whether the fused experts are asked for, run on this device, and cover the shapes.

    Args:
        kernels: `auto` asks for them on a GPU in 16 bit, `triton` wherever they run.
    """
    asked = kernels == "triton" or (
        kernels == "auto" and x_TD.is_cuda and x_TD.dtype in (torch.bfloat16, torch.float16)
    )
    if not (asked and runs_triton(x_TD.device)) or 0 in (src_R.numel(), *gate_up.shape):
        return False
    row_bytes = [n * x_TD.element_size() for n in (gate_up.size(2), gate_up.size(1) // 2)]
    aligned = all(n % 16 == 0 for n in row_bytes)  # what a TMA descriptor takes
    return aligned and x_TD.dtype in (torch.bfloat16, torch.float16, torch.float32)


def expert_mlp(
    x_TD: Tensor,
    weight_TK: Tensor,
    gate_up: Tensor,
    down: Tensor,
    src_R: Tensor,
    choice_R: Tensor,
    offsets_G1: Tensor,
    row_TK: Tensor,
) -> Tensor:
    """`expert_mlp.expert_mlp`."""
    from moe_router_kernels import expert_mlp as module

    plan = (src_R, choice_R, offsets_G1, row_TK)
    return module.expert_mlp(x_TD, weight_TK, gate_up, down, *plan)
