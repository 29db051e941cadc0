"""The experts of one rank as one torch operation, by the Triton kernels of `fused_experts`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moe_router_kernels.choose import uses_triton
from moe_router_kernels.operation import operation, unheard
from moe_router_kernels.plan_op import plan_from_ids
from moe_router_kernels.tiles import Few, is_few


def runs_expert_mlp(kernels: str, x_TD: Tensor, gate_up: Tensor) -> bool:
    """Whether `expert_mlp` is asked for, runs on this device, and covers the shapes.

    Args:
        kernels: see `choose.uses_triton`; `auto` asks for it in 16 bit.
    """
    uncovered, dtype = "", x_TD.dtype
    row_bytes = [n * x_TD.element_size() for n in (gate_up.size(2), gate_up.size(1) // 2)]
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        uncovered = f"{dtype}"
    elif kernels == "auto" and dtype == torch.float32:
        uncovered = "fp32 is faster by torch's grouped_mm"
    elif any(n % 16 for n in row_bytes):  # what a TMA descriptor takes
        uncovered = f"rows of {row_bytes[0]} and {row_bytes[1]} bytes are no multiples of 16"
    elif 0 in gate_up.shape:
        uncovered = "no experts here"
    runs: bool = uses_triton("experts", kernels, x_TD.device, uncovered)
    return runs


@operation("moe_router::expert_mlp")
def _expert_mlp(
    x_TD: Tensor,
    weight_TK: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_cast: Tensor,
    down_cast: Tensor,
    src_R: Tensor,
    choice_R: Tensor,
    offsets_G1: Tensor,
    row_TK: Tensor,
    keep: bool,
    overwrite: bool,
) -> tuple[Tensor, Tensor]:
    """The result, and pre-activations if `keep`: with `overwrite` for the backward pass alone."""
    from moe_router_kernels import fused_experts

    if src_R.numel() == 0:
        return torch.zeros_like(x_TD), x_TD.new_empty(0, gate_up.size(1))
    plan = (src_R, choice_R, offsets_G1, row_TK)
    return fused_experts.forward(x_TD, weight_TK, gate_up_cast, down_cast, plan, keep)


@operation("moe_router::expert_mlp_backward")
def _expert_mlp_backward(
    grad_TD: Tensor,
    x_TD: Tensor,
    weight_TK: Tensor,
    gate_up: Tensor,
    down: Tensor,
    pre_RF: Tensor,
    src_R: Tensor,
    choice_R: Tensor,
    offsets_G1: Tensor,
    row_TK: Tensor,
    gate_up_dtype: torch.dtype,
    down_dtype: torch.dtype,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A gradient that is not wanted is empty."""
    plan = (src_R, choice_R, offsets_G1, row_TK)
    leaves, dtypes = (x_TD, weight_TK, gate_up, down), (gate_up_dtype, down_dtype)
    grads = _gradients(grad_TD, *leaves, pre_RF, plan, dtypes, wanted, overwrite=False)
    return _four(x_TD.new_empty(0) if grad is None else grad for grad in grads)


def _gradients(
    grad_TD: Tensor,
    x_TD: Tensor,
    weight_TK: Tensor,
    gate_up: Tensor,
    down: Tensor,
    pre_RF: Tensor,
    plan: tuple[Tensor, Tensor, Tensor, Tensor],
    dtypes: tuple[torch.dtype, torch.dtype],
    wanted: list[bool],
    overwrite: bool,
) -> Sequence[Tensor | None]:
    from moe_router_kernels import fused_experts

    leaves = (x_TD, weight_TK, gate_up, down)
    if plan[0].numel() == 0:
        kinds = (x_TD.dtype, weight_TK.dtype, *dtypes)
        return [torch.zeros_like(x, dtype=d) for x, d in zip(leaves, kinds, strict=True)]
    return fused_experts.backward(grad_TD, *leaves, pre_RF, plan, dtypes, wanted, overwrite)


def _four(grads: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, weight, gate_up, down = grads
    return x, weight, gate_up, down


@_expert_mlp.register_fake
def _(
    x_TD: Tensor, weight_TK: Tensor, gate_up: Tensor, down: Tensor, gate_up_cast: Tensor,
    down_cast: Tensor, src_R: Tensor, choice_R: Any, offsets_G1: Any, row_TK: Any, keep: bool,
    overwrite: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    pre_RF = x_TD.new_empty(src_R.size(0) if keep else 0, gate_up.size(1))
    return torch.empty_like(x_TD), pre_RF


@_expert_mlp_backward.register_fake
def _(
    grad_TD: Tensor, x_TD: Tensor, weight_TK: Tensor, gate_up: Tensor, down: Tensor,
    pre_RF: Any, src_R: Any, choice_R: Any, offsets_G1: Any, row_TK: Any,
    gate_up_dtype: torch.dtype, down_dtype: torch.dtype, wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    leaves = (x_TD, weight_TK, gate_up, down)
    dtypes = (x_TD.dtype, weight_TK.dtype, gate_up_dtype, down_dtype)
    return _four(
        torch.empty_like(leaf, dtype=dtype) if want else x_TD.new_empty(0)
        for leaf, dtype, want in zip(leaves, dtypes, wanted, strict=True)
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x_TD, weight_TK, gate_up, down, *cast_and_plan, _, ctx.overwrite = inputs
    ctx.save_for_backward(x_TD, weight_TK, output[1], *cast_and_plan)
    ctx.dtypes = gate_up.dtype, down.dtype
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # else zeros as large as the pre-activations


def _backward(ctx: Any, grad_TD: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if grad_TD is None:
        return (None,) * 12
    x_TD, weight_TK, pre_RF, gate_up, down, *rest = ctx.saved_tensors
    tensors, dtypes = (grad_TD, x_TD, weight_TK, gate_up, down, pre_RF), ctx.dtypes
    wanted = list(ctx.needs_input_grad[:4])
    plan = _four(rest)
    grads: Sequence[Tensor | None]
    if ctx.overwrite and _is_last(pre_RF):
        grads = _gradients(*tensors, plan, dtypes, wanted, overwrite=True)
    else:
        grads = _expert_mlp_backward(*tensors, *plan, *dtypes, wanted)
    kept = (grad if want else None for grad, want in zip(grads, wanted, strict=True))
    return *kept, *[None] * 8


def _is_last(pre_RF: Tensor) -> bool:
    """Whether nothing reads the pre-activations after this backward pass, and nothing traces it."""
    keeps: bool = torch._C._autograd._get_current_graph_task_keep_graph()
    return not keeps and unheard((pre_RF,))


_expert_mlp.register_autograd(_backward, setup_context=_keep)


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
    """Each token's sum over its choices of weight * down(silu(gate x) * up x).

    Args:
        x_TD: (T, D) bf16, fp16 or fp32, where `runs_expert_mlp` holds.
        weight_TK: (T, K) fp32.
        gate_up: (G, 2 F, D), gate first, of any float dtype.
        down: (G, D, F), likewise.
        src_R, choice_R, offsets_G1, row_TK: int32, of a Plan over the G groups.

    Returns:
        (T, D) of x's dtype. Sums over K are fp32 in order of k; everything repeats bit by bit.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit each other.
    """
    leaves = (x_TD, weight_TK, gate_up, down)
    _check(*leaves, row_TK, offsets_G1)
    keep = _learns(*leaves)
    # cast outside of the operation, so that forward and backward share the copies, and a gradient
    # is written in the dtype of its weight at once
    cast = (w.detach().to(x_TD.dtype) for w in (gate_up, down))
    plan = (src_R, choice_R, offsets_G1, row_TK)
    out: Tensor = _expert_mlp(*leaves, *cast, *plan, keep, True)[0]
    return out


@operation("moe_router::few_experts")
def _few_experts(
    x_TD: Tensor, weight_TK: Tensor, ids_TK: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    from moe_router_kernels import few_rows

    tensors = (t.contiguous() for t in (x_TD, weight_TK, gate_up, down))
    return few_rows.forward(*tensors, ids_TK=ids_TK.contiguous(), few=Few())


@_few_experts.register_fake
def _(x_TD: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x_TD)


def expert_mlp_of_ids(
    x_TD: Tensor, weight_TK: Tensor, ids_TK: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """`expert_mlp` for choices made elsewhere; for few tokens without gradients it needs no Plan.

    Args:
        weight_TK: of any float dtype.
        ids_TK: (T, K) integers; an id that is no group adds nothing.
    """
    leaves, G, R = (x_TD, weight_TK, gate_up, down), gate_up.size(0), ids_TK.numel()
    alike = x_TD.dtype == gate_up.dtype == down.dtype
    if R and is_few(x_TD.size(0), R, G) and alike and not _learns(*leaves):
        _check(*leaves, ids_TK)
        out: Tensor = _few_experts(x_TD, weight_TK, ids_TK, gate_up, down)
        return out
    plan = plan_from_ids(ids_TK.int(), G)
    return expert_mlp(x_TD, weight_TK.float(), gate_up, down, *plan)


def _learns(*leaves: Tensor) -> bool:
    """Whether a backward pass may come."""
    return torch.is_grad_enabled() and any(leaf.requires_grad for leaf in leaves)


def _check(
    x_TD: Tensor, weight_TK: Tensor, gate_up: Tensor, down: Tensor, choice_TK: Tensor,
    offsets_G1: Tensor | None = None,
) -> None:  # fmt: skip
    G, width, D = gate_up.shape if gate_up.dim() == 3 else (0, 0, 0)
    hidden = width // 2
    for name, tensor, shape in (
        ("x_TD", x_TD, (x_TD.size(0), D)),
        ("weight_TK", weight_TK, tuple(choice_TK.shape)),
        ("choices", choice_TK, (x_TD.size(0), choice_TK.size(-1))),
        ("gate_up", gate_up, (G, 2 * hidden, D)),
        ("down", down, (G, D, hidden)),
        ("offsets_G1", offsets_G1, (G + 1,)),
    ):
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape or tensor.device != x_TD.device:
            raise ValueError(
                f"{name}: got {tuple(tensor.shape)} on {tensor.device}, want {shape} on "
                f"{x_TD.device}, as gate_up {tuple(gate_up.shape)} says"
            )
