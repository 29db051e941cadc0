"""The gate as a torch operation: autograd, torch.compile, CUDA graphs.

It runs its Triton kernels or the reference, whichever `choose` says: equal integers, and weights
that differ by rounding at most.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_router_kernels import reference
from moe_router_kernels.choose import uses_triton
from moe_router_kernels.operation import operation
from moe_router_kernels.plan_op import PlanTensors, check_ids, real, said

_Nine = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class Gate(NamedTuple):
    """Attributes:
    raw_TK: int32, the groups of each token, best first; ids >= experts are null experts.
    weight_TK: fp32, 0 for null experts; differentiable.
    share_G: fp32 sum of the tokens' probabilities, (0,) if no sums were asked for; differentiable.
    z: (1,) fp32 sum of the squared log-sum-exp of the logits, or (0,); differentiable.
    load_G: int32, choices of each group; None if the choices were given.
    plan: src_R, choice_R, offsets_G1 (over the experts), row_TK; None if they were given.
    """

    raw_TK: Tensor
    weight_TK: Tensor
    share_G: Tensor
    z: Tensor
    load_G: Tensor | None
    plan: PlanTensors | None


def gate(
    logits_TG: Tensor,
    k: int,
    *,
    experts: int,
    score: str = "softmax",
    renormalise: bool = True,
    bias_E: Tensor | None = None,
    expert_groups: int = 1,
    top_groups: int = 1,
    given_TK: Tensor | None = None,
    sums: bool = False,
    kernels: str = "auto",
) -> Gate:
    """From logits to choices, their weights, the Plan, and what the losses add up.

    The order is that of the logits, or of the scores where a bias or groups ask for scores. A NaN
    ranks below every number; with softmax all weights of its token are NaN, and among scores all
    its choices the lowest ids.

    Args:
        logits_TG: (T, G) floats; the groups past `experts` are null experts.
        k: choices of a token, at most G.
        score: `softmax` or `sigmoid`.
        renormalise: divide a token's weights by their sum.
        bias_E: (experts,) fp32, added for the choice alone.
        expert_groups, top_groups: choose in the best groups of neighbouring experts.
        given_TK: choices made elsewhere: int32, -1 or an id past `experts` has no weight.
        sums: give `share_G` and `z`.
        kernels: see `choose.uses_triton`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    _check(logits_TG, k, experts, score, bias_E, given_TK)
    triton = _triton(logits_TG, k, experts, expert_groups, kernels)
    if given_TK is not None:
        how = (experts, score, renormalise, sums, triton)
        weight_TK, share_G, z = _weigh(logits_TG, given_TK, *how)
        return Gate(given_TK, weight_TK, share_G, z, None, None)
    weight_TK, share_G, z, raw_TK, load_G, *plan = _gate(
        logits_TG, k, experts, score, renormalise, sums, triton, bias_E, expert_groups, top_groups
    )
    src_R, choice_R, offsets_G1, row_TK = plan
    whole = (src_R, choice_R, offsets_G1, row_TK)
    return Gate(raw_TK, weight_TK, share_G, z, load_G, whole)


@operation("moe_router::gate")
def _gate(
    logits_TG: Tensor,
    k: int,
    experts: int,
    score: str,
    renormalise: bool,
    sums: bool,
    triton: bool,
    bias_E: Tensor | None,
    expert_groups: int,
    top_groups: int,
) -> _Nine:
    if triton:
        from moe_router_kernels import fused_gate, planning

        rule = fused_gate.Rule(experts, score, renormalise, expert_groups, top_groups)
        made = fused_gate.gate(logits_TG, k, rule, bias_E=bias_E, sums=sums)
        load_G, share_G, z, plan = planning.finish(made, experts)
        return made.weight_TK, share_G, z, made.raw_TK, load_G, *plan
    score_TG = reference.score(logits_TG, score)
    raw_TK = reference.decide(logits_TG, k, experts, score, bias_E, expert_groups, top_groups)
    target_TK = real(raw_TK, experts)
    weight_TK = reference.choice_weights(score_TG, target_TK, renormalise)
    load_G = reference.count(raw_TK, logits_TG.size(1)).int()
    plan = reference.plan(target_TK, experts)
    return weight_TK, *_sums(logits_TG, score_TG, sums), raw_TK, load_G, *plan


@operation("moe_router::weigh")
def _weigh(
    logits_TG: Tensor,
    given_TK: Tensor,
    experts: int,
    score: str,
    renormalise: bool,
    sums: bool,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if triton:
        from moe_router_kernels import fused_gate

        rule = fused_gate.Rule(experts, score, renormalise)
        K = given_TK.size(1)
        made = fused_gate.gate(logits_TG, K, rule, given_TK=given_TK, sums=sums)
        none = made.z_N.new_empty(0)
        share_G, z = (made.share_GN.sum(1), made.z_N.sum()[None]) if sums else (none, none.clone())
        return made.weight_TK, share_G, z
    score_TG = reference.score(logits_TG, score)
    weight_TK = reference.choice_weights(score_TG, real(given_TK, experts), renormalise)
    return weight_TK, *_sums(logits_TG, score_TG, sums)


@operation("moe_router::gate_backward")
def _gate_backward(
    grad_TK: Tensor,
    grad_G: Tensor | None,
    grad_z: Tensor | None,
    logits_TG: Tensor,
    raw_TK: Tensor,
    experts: int,
    score: str,
    renormalise: bool,
    triton: bool,
) -> Tensor:
    if triton:
        from moe_router_kernels import fused_gate

        rule = fused_gate.Rule(experts, score, renormalise)
        return fused_gate.gate_backward(grad_TK, grad_G, grad_z, logits_TG, raw_TK, rule)
    target_TK = real(raw_TK, experts)
    grad_TG = reference.gate_backward(
        grad_TK, grad_G, grad_z, logits_TG, target_TK, score, renormalise
    )
    return grad_TG.to(logits_TG.dtype)


@_gate.register_fake
def _(
    logits_TG: Tensor, k: int, experts: int, score: str, renormalise: bool, sums: bool, *_: Any
) -> _Nine:
    T, G = logits_TG.shape

    def ints(*shape: int) -> Tensor:
        return logits_TG.new_empty(shape, dtype=torch.int32)

    share_G, z = _fake_sums(logits_TG, sums)
    weight_TK = logits_TG.new_empty((T, k), dtype=share_G.dtype)
    plan = (ints(T * k), ints(T * k), ints(experts + 1), ints(T, k))
    return weight_TK, share_G, z, ints(T, k), ints(G), *plan


@_weigh.register_fake
def _(
    logits_TG: Tensor, given_TK: Tensor, experts: int, score: str, renormalise: bool, sums: bool,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    share_G, z = _fake_sums(logits_TG, sums)
    return logits_TG.new_empty(given_TK.shape, dtype=share_G.dtype), share_G, z


@_gate_backward.register_fake
def _(grad_TK: Tensor, grad_G: Any, grad_z: Any, logits_TG: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits_TG)


def _fake_sums(logits_TG: Tensor, sums: bool) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(logits_TG.dtype, torch.float32)
    sizes = (logits_TG.size(1), 1) if sums else (0, 0)
    share_G, z = (logits_TG.new_empty(n, dtype=dtype) for n in sizes)
    return share_G, z


def _keep_gate(ctx: Any, inputs: tuple[Any, ...], output: _Nine) -> None:
    logits_TG, _, *ctx.how, ctx.sums, ctx.triton = inputs[:7]
    ctx.save_for_backward(logits_TG, output[3])


def _keep_weigh(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    logits_TG, given_TK, *ctx.how, ctx.sums, ctx.triton = inputs
    ctx.save_for_backward(logits_TG, given_TK)


def _grad_logits(ctx: Any, grad_TK: Tensor, grad_G: Tensor, grad_z: Tensor) -> Tensor:
    logits_TG, raw_TK = ctx.saved_tensors
    sums = (grad_G, grad_z) if ctx.sums else (None, None)
    grad_TG: Tensor = _gate_backward(grad_TK, *sums, logits_TG, raw_TK, *ctx.how, ctx.triton)
    return grad_TG


_gate.register_autograd(
    lambda ctx, *grads: (_grad_logits(ctx, *grads[:3]), *[None] * 9), setup_context=_keep_gate
)
_weigh.register_autograd(
    lambda ctx, *grads: (_grad_logits(ctx, *grads), *[None] * 6), setup_context=_keep_weigh
)


def _sums(logits_TG: Tensor, score_TG: Tensor, sums: bool) -> tuple[Tensor, Tensor]:
    if sums:
        return reference.loss_sums(logits_TG, score_TG)
    return score_TG.new_empty(0), score_TG.new_empty(0)


def _triton(logits_TG: Tensor, k: int, experts: int, expert_groups: int, kernels: str) -> bool:
    G, uncovered = logits_TG.size(1), ""
    whole = experts == G and experts & (experts - 1) == 0
    even = expert_groups & (expert_groups - 1) == 0 and experts // expert_groups >= 2
    if expert_groups > 1 and not (whole and even):
        uncovered = f"{expert_groups} groups of {experts} experts are no powers of two"
    if k > 32 or G > 1024:
        uncovered = f"{k} choices of {G} groups: more than 32 of 1024"
    if logits_TG.dtype == torch.float64:
        uncovered = "fp64"
    return uses_triton("gate", kernels, logits_TG.device, uncovered)


def _check(
    logits_TG: Tensor,
    k: int,
    experts: int,
    score: str,
    bias_E: Tensor | None,
    given_TK: Tensor | None,
) -> None:
    if logits_TG.dim() != 2 or not logits_TG.is_floating_point():
        raise ValueError(f"logits: got {said(logits_TG)}, want (tokens, groups) of a float dtype")
    T, G = logits_TG.shape
    if not 1 <= experts <= G:
        raise ValueError(f"experts={experts} of {G} groups: want 1 to {G}; the rest are null")
    if score not in ("softmax", "sigmoid"):
        raise ValueError(f"score={score}: want softmax or sigmoid")
    if given_TK is not None:
        check_ids("given_TK", given_TK)
        if given_TK.size(0) != T or given_TK.device != logits_TG.device:
            raise ValueError(
                f"given_TK: got {said(given_TK)}, want {T} tokens on {logits_TG.device}"
            )
    elif not 1 <= k <= G:
        raise ValueError(f"k={k} of {G} groups: want 1 to {G}")
    if bias_E is not None and (
        bias_E.shape != (experts,)
        or bias_E.device != logits_TG.device
        or bias_E.dtype not in (torch.float32, torch.float64)
    ):
        raise ValueError(
            f"bias_E: got {said(bias_E)}, want ({experts},) float32 on {logits_TG.device}"
        )
