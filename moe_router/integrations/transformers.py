"""Experts of Hugging Face models through our kernels: one line, no change to the model.

    moe_router.register_transformers()
    model = AutoModelForCausalLM.from_pretrained(name, experts_implementation="moe_router")

transformers calls an experts implementation with the tokens, and the ids and weights that the
model's own router chose; ids past the last expert stand for experts of other ranks.
"""

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import SiLUActivation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate

from moe_router_kernels import (
    combine,
    expert_mlp_of_ids,
    gather,
    grouped_mm,
    plan_from_ids,
    runs_expert_mlp,
)
from moe_router_kernels.choose import uses_triton
from moe_router_kernels.reference import wide

NAME = "moe_router"


class HFExperts(Protocol):
    """What transformers' decorator `use_experts_implementation` says of a module of experts.

    Attributes:
        has_gate: weights are `gate_up_proj`, else `up_proj`.
        is_transposed: weights are (E, in, out), else (E, out, in).
        is_concatenated: gate before up, else they alternate, which `_apply_gate` knows.

    5.17 knows no `has_post_expert_norm`, has no such module, and does not say whether experts are
    spread over ranks (`_is_expert_parallel`).
    """

    num_experts: int
    has_gate: bool
    has_bias: bool
    has_post_expert_norm: bool
    is_transposed: bool
    is_concatenated: bool
    down_proj: Tensor
    act_fn: nn.Module
    _is_expert_parallel: bool

    def _apply_gate(self, gate_up_out: Tensor) -> Tensor: ...


def register_transformers() -> None:
    """Make `experts_implementation="moe_router"` known to transformers."""
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


def experts_forward(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """(T, D): each token's sum over its choices of weight * expert(token).

    Args:
        self: a module as `HFExperts` describes it.
        hidden_states: (T, D).
        top_k_index: (T, K) integers; an id that is no expert here adds nothing.
        top_k_weights: (T, K).
    """
    up = self.gate_up_proj if self.has_gate else self.up_proj
    device = hidden_states.device.type
    autocast = torch.is_autocast_enabled(device)
    x_TD = hidden_states.to(torch.get_autocast_dtype(device) if autocast else up.dtype)
    if _fuses(self, x_TD):
        out_TD = expert_mlp_of_ids(x_TD, top_k_weights, top_k_index, up, self.down_proj)
    else:
        out_TD = _by_parts(self, x_TD, top_k_weights.float(), up, top_k_index)
    return out_TD.to(hidden_states.dtype)


def _fuses(self: Any, x_TD: Tensor) -> bool:
    """Whether one fused operation computes these experts; if not, the log says once why."""
    uncovered = _uncovered(self)
    if uncovered:
        return uses_triton(f"experts of {type(self).__name__}", "auto", x_TD.device, uncovered)
    return runs_expert_mlp("auto", x_TD, self.gate_up_proj)


def _uncovered(self: Any) -> str:
    """What of a module the fused kernels do not cover; empty if nothing."""
    plain_gate = type(self)._apply_gate is _default_apply_gate
    act_fn = getattr(self, "act_fn", None)  # a gate of its own may need none
    silu = act_fn is F.silu or isinstance(act_fn, nn.SiLU | SiLUActivation)
    for missing, what in (
        (not self.has_gate, "no gate"),
        (self.has_bias, "biases"),
        (self.is_transposed, "weights stored (in, out)"),
        (not self.is_concatenated, "gate and up that alternate"),
        (not plain_gate, "a gate of its own"),
        (not silu, "an activation that is not SiLU"),
        (_has_norm(self), "a norm after each expert"),
    ):
        if missing:
            return what
    return ""


def _has_norm(self: Any) -> bool:
    return getattr(self, "has_post_expert_norm", False)


def _by_parts(
    self: Any, x_TD: Tensor, weight_TK: Tensor, up: Tensor, top_k_index: Tensor
) -> Tensor:
    """The same by a gather, two grouped products and a combine, with the module's own gate."""
    plan = plan_from_ids(top_k_index.int(), self.num_experts)
    src_R, choice_R, offsets_G1, row_TK = plan
    bias, expert_R = (None, None), None
    if self.has_bias:
        bias = self.gate_up_proj_bias if self.has_gate else self.up_proj_bias, self.down_proj_bias
        expert_R = top_k_index.flatten()[choice_R.clamp(min=0)].clamp(0, self.num_experts - 1)
    # rows that no choice has are unspecified, and must not reach gradients that add up all rows
    absent_R1 = (src_R < 0)[:, None] if getattr(self, "_is_expert_parallel", True) else None

    def linear(rows: Tensor, weight: Tensor, bias_EF: Tensor | None) -> Tensor:
        weight = weight.to(rows.dtype)
        out = grouped_mm(rows, weight if self.is_transposed else weight.mT, offsets_G1)
        if bias_EF is not None:
            # in fp32, for the gradient of a bias adds up all rows of its expert
            out = (out + wide(bias_EF)[expert_R]).to(out.dtype)
        return out if absent_R1 is None else out.masked_fill(absent_R1, 0.0)

    rows_RD = gather(x_TD, src_R, row_TK)
    up_RF = linear(rows_RD, up, bias[0])
    act_RF = self._apply_gate(up_RF) if self.has_gate else self.act_fn(up_RF)
    y_RD = linear(act_RF, self.down_proj, bias[1])
    if _has_norm(self):
        y_RD = self.post_expert_norm(y_RD)
    return combine(y_RD, weight_TK, src_R, choice_R, row_TK)
