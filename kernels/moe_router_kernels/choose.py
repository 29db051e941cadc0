"""Which implementation decides and plans, and one call for whichever it is."""

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


def gate_and_plan(
    logits_TG: Tensor, k: int, *, experts: int, score: str, bias_E: Tensor | None
) -> dict[str, Tensor]:
    """`fused.gate_and_plan`, imported on first use: it brings Triton, which not every machine has.

    Args:
        logits_TG: (T, G) fp32 on a device for which `runs_triton` holds.
        bias_E: (experts,) fp32 or None.

    Returns:
        target_TK int32 (-1 for a null choice), load_G int32, and a dropless Plan over the experts:
        src_R, choice_R, offsets_G1, row_TK int32.
    """
    from moe_router_kernels import fused

    return fused.gate_and_plan(
        logits_TG.detach().contiguous(), k, experts=experts, score=score, bias_E=bias_E
    )
