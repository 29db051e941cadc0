"""Row movement and grouped GEMM as torch operations. Specification: `reference`.

Gather's backward is a combine and combine's backward is a gather, so there are no atomics and
the sums have a fixed order on every device.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_router_kernels import reference
from moe_router_kernels.choose import uses_triton
from moe_router_kernels.operation import operation


@operation("moe_router::gather")
def _gather(x_TD: Tensor, src_R: Tensor, row_TK: Tensor) -> Tensor:
    if _triton(x_TD):
        from moe_router_kernels import permute

        return permute.move_rows(x_TD.contiguous(), row_TK.contiguous(), src_R.numel())
    return reference.gather(x_TD, src_R)


@operation("moe_router::combine")
def _combine(
    y_RD: Tensor, weight_TK: Tensor | None, src_R: Tensor, choice_R: Tensor, row_TK: Tensor
) -> Tensor:
    """`reference.combine`; no weights are weights of 1."""
    if _triton(y_RD):
        from moe_router_kernels import permute

        weights = None if weight_TK is None else weight_TK.contiguous()
        return permute.combine_rows(y_RD.contiguous(), row_TK.contiguous(), weights)
    if weight_TK is None:
        weight_TK = torch.ones(row_TK.shape, device=row_TK.device)
    if not _one_pass(y_RD, row_TK):
        return reference.combine(y_RD, weight_TK, row_TK)
    weight_TK = weight_TK.masked_fill(row_TK < 0, 0.0)
    return F.embedding_bag(row_TK.clamp(min=0), y_RD, per_sample_weights=weight_TK, mode="sum")


@operation("moe_router::combine_backward")
def _combine_backward(
    grad_TD: Tensor, y_RD: Tensor, weight_TK: Tensor, src_R: Tensor, choice_R: Tensor,
    row_TK: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if _triton(y_RD):
        from moe_router_kernels import permute

        tensors = (grad_TD, y_RD, weight_TK, src_R, choice_R, row_TK)
        return permute.combine_backward(*(t.contiguous() for t in tensors))
    return reference.combine_backward(grad_TD, y_RD, weight_TK, src_R, choice_R, row_TK)


def _triton(rows: Tensor) -> bool:
    uncovered = "fp64" if rows.dtype == torch.float64 else ""
    return uses_triton("rows", "auto", rows.device, uncovered)


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


@_gather.register_fake
def _(x_TD: Tensor, src_R: Tensor, row_TK: Tensor) -> Tensor:
    return x_TD.new_empty(src_R.size(0), x_TD.size(1))


@_combine.register_fake
def _(y_RD: Tensor, weight_TK: Any, src_R: Any, choice_R: Any, row_TK: Tensor) -> Tensor:
    return y_RD.new_empty(row_TK.size(0), y_RD.size(1))


@_combine_backward.register_fake
def _(
    grad_TD: Tensor, y_RD: Tensor, weight_TK: Tensor, src_R: Any, choice_R: Any, row_TK: Any
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(y_RD), torch.empty_like(weight_TK)


def _keep_ids(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _gather_backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None, None]:
    src_R, row_TK = ctx.saved_tensors
    return _combine(grad_RD, None, src_R, src_R, row_TK), None, None


def _keep_all(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _of_combine(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
    return *_combine_backward(grad_TD, *ctx.saved_tensors), None, None, None


_gather.register_autograd(_gather_backward, setup_context=_keep_ids)
_combine.register_autograd(_of_combine, setup_context=_keep_all)


def gather(x_TD: Tensor, src_R: Tensor, row_TK: Tensor) -> Tensor:
    """Copy tokens into rows: `reference.gather`, with `row_TK` for its backward.

    Args:
        x_TD: (T, D), any float dtype.
        src_R: (R,) int32, from a Plan.
        row_TK: (T, K) int32, the inverse of src_R.

    Returns:
        (R, D) of x's dtype; rows past the plan's end are unspecified.
    """
    rows_RD: Tensor = _gather(x_TD, src_R, row_TK)
    return rows_RD


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
    out_TD: Tensor = _combine(y_RD, weight_TK, src_R, choice_R, row_TK)
    return out_TD


@operation("moe_router::grouped_mm")
def _grouped_mm(x_RD: Tensor, w_GDF: Tensor, offsets_G1: Tensor) -> Tensor:
    if _torch_multiplies(x_RD, w_GDF):
        return F.grouped_mm(x_RD, w_GDF, offs=offsets_G1[1:])
    return reference.grouped_mm(x_RD, w_GDF, offsets_G1)


@operation("moe_router::group_weights")
def _group_weights(x_RD: Tensor, y_RF: Tensor, offsets_G1: Tensor) -> Tensor:
    """(G, D, F): x transposed times y over the rows of each group."""
    if _torch_multiplies(x_RD, y_RF):
        return F.grouped_mm(x_RD.mT, y_RF, offs=offsets_G1[1:])
    return reference.group_weights(x_RD, y_RF, offsets_G1)


def _torch_multiplies(x_RD: Tensor, other: Tensor) -> bool:
    """torch's kernel wants strides of 16 bytes, something to multiply, and has no fp64."""
    sizes = (x_RD.size(1), *other.shape[-2:]) if other.dim() == 3 else (x_RD.size(1), other.size(1))
    aligned = all(n * x_RD.element_size() % 16 == 0 for n in sizes)
    return aligned and x_RD.dtype != torch.float64 and 0 not in (x_RD.size(0), other.size(0))


@_grouped_mm.register_fake
def _(x_RD: Tensor, w_GDF: Tensor, offsets_G1: Tensor) -> Tensor:
    return x_RD.new_empty(x_RD.size(0), w_GDF.size(2))


@_group_weights.register_fake
def _(x_RD: Tensor, y_RF: Tensor, offsets_G1: Tensor) -> Tensor:
    return x_RD.new_empty(offsets_G1.size(0) - 1, x_RD.size(1), y_RF.size(1))


def _of_grouped_mm(ctx: Any, grad_RF: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x_RD, w_GDF, offsets_G1 = ctx.saved_tensors
    grad_RF = grad_RF.contiguous()
    grad_x = grad_w = None
    if ctx.needs_input_grad[0]:
        grad_x = _grouped_mm(grad_RF, w_GDF.mT, offsets_G1)
    if ctx.needs_input_grad[1]:
        # in the layout of w, so that the gradient of a transposed parameter is contiguous
        if w_GDF.is_contiguous():
            grad_w = _group_weights(x_RD, grad_RF, offsets_G1)
        else:
            grad_w = _group_weights(grad_RF, x_RD, offsets_G1).mT
    return grad_x, grad_w, None


_grouped_mm.register_autograd(_of_grouped_mm, setup_context=_keep_all)


def grouped_mm(x_RD: Tensor, w_GDF: Tensor, offsets_G1: Tensor) -> Tensor:
    """Multiply the rows of group g by w[g]: `reference.grouped_mm` at the speed of the device.

    Args:
        x_RD: (R, D), sorted by group.
        w_GDF: (G, D, F), x's dtype; contiguous, or the transpose of what is.
        offsets_G1: (G + 1,) int32.

    Returns:
        (R, F) of x's dtype; rows past offsets_G1[G] are unspecified.
    """
    y_RF: Tensor = _grouped_mm(x_RD.contiguous(), w_GDF, offsets_G1)
    return y_RF
