"""Differentiable row movement and grouped GEMM. Specification: `reference`.

Gather's backward is a combine and combine's backward is a gather, so there are no atomics and
the sums have a fixed order on every device.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_router_kernels import reference


def _combine(y_RD: Tensor, weight_TK: Tensor, row_TK: Tensor) -> Tensor:
    """`reference.combine`; on a CPU in one pass over the rows, where it is safe."""
    if not _one_pass(y_RD, row_TK):
        return reference.combine(y_RD, weight_TK, row_TK)
    weight_TK = weight_TK.masked_fill(row_TK < 0, 0.0)
    return F.embedding_bag(row_TK.clamp(min=0), y_RD, per_sample_weights=weight_TK, mode="sum")


def _one_pass(y_RD: Tensor, row_TK: Tensor) -> bool:
    """Whether a missing choice, which reads row 0 with weight 0, reads something finite there.

    Looks at values on a CPU alone: on another device that would wait for it.
    """
    if y_RD.device.type != "cpu" or y_RD.dtype != torch.float32:
        return False
    missing = int((row_TK < 0).sum())
    if y_RD.size(0) == 0 or row_TK.numel() - missing != y_RD.size(0):
        return False
    return missing == 0 or bool(y_RD[0].isfinite().all())


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, src_R: Tensor, row_TK: Tensor) -> Tensor:
        ctx.save_for_backward(row_TK)
        return reference.gather(x_TD, src_R)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (row_TK,) = ctx.saved_tensors
        unit_TK = torch.ones(row_TK.shape, device=row_TK.device)
        return _combine(grads[0].contiguous(), unit_TK, row_TK), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y_RD: Tensor, weight_TK: Tensor, src_R: Tensor, choice_R: Tensor, row_TK: Tensor
    ) -> Tensor:
        ctx.save_for_backward(y_RD, weight_TK, src_R, choice_R, row_TK)
        return _combine(y_RD, weight_TK, row_TK)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        grad_RD, grad_TK = reference.combine_backward(grads[0], *ctx.saved_tensors)
        return grad_RD, grad_TK, None, None, None


def gather(x_TD: Tensor, src_R: Tensor, row_TK: Tensor) -> Tensor:
    """Copy tokens into rows: `reference.gather`, with `row_TK` for its backward.

    Args:
        x_TD: (T, D), any float dtype.
        src_R: (R,) int32, from a Plan.
        row_TK: (T, K) int32, the inverse of src_R.

    Returns:
        (R, D) of x's dtype; rows past the plan's end are unspecified.
    """
    out: Tensor = _Gather.apply(x_TD, src_R, row_TK)  # type: ignore[no-untyped-call]
    return out


def combine(
    y_RD: Tensor, weight_TK: Tensor, src_R: Tensor, choice_R: Tensor, row_TK: Tensor
) -> Tensor:
    """Sum each token's rows by weight: `reference.combine`, differentiable in rows and weights.

    Args:
        y_RD: (R, D), any float dtype.
        weight_TK: (T, K) fp32.
        src_R, choice_R, row_TK: int32, from a Plan.

    Returns:
        (T, D) of y's dtype, accumulated in fp32 in order of k.
    """
    rows = (src_R, choice_R, row_TK)
    out: Tensor = _Combine.apply(y_RD, weight_TK, *rows)  # type: ignore[no-untyped-call]
    return out


def grouped_mm(x_RD: Tensor, w_GDF: Tensor, offsets_G1: Tensor) -> Tensor:
    """Multiply the rows of group g by w[g]: `reference.grouped_mm` at the speed of the device.

    Args:
        x_RD: (R, D), sorted by group, contiguous.
        w_GDF: (G, D, F), x's dtype; contiguous, or the transpose of what is.
        offsets_G1: (G + 1,) int32.

    Returns:
        (R, F) of x's dtype; rows past offsets_G1[G] are unspecified.
    """
    # torch's kernel wants strides of 16 bytes and has no fp64
    aligned = all(n * x_RD.element_size() % 16 == 0 for n in w_GDF.shape[1:])
    if x_RD.dtype == torch.float64 or not aligned or x_RD.size(0) == 0 or w_GDF.size(0) == 0:
        return reference.grouped_mm(x_RD, w_GDF, offsets_G1)
    return F.grouped_mm(x_RD, w_GDF, offs=offsets_G1[1:])
