"""The arithmetic of routing on bare tensors; usable alone with torch.

`reference` is the specification. The operations here are its differentiable, fastest forms.
"""

from moe_router_kernels.expert_op import expert_mlp, expert_mlp_of_ids, runs_expert_mlp
from moe_router_kernels.gate_op import Gate, gate
from moe_router_kernels.ops import combine, gather, grouped_mm
from moe_router_kernels.plan_op import plan_from_ids, select_top_c, within_capacity

__all__ = [
    "Gate",
    "combine",
    "expert_mlp",
    "expert_mlp_of_ids",
    "gate",
    "gather",
    "grouped_mm",
    "plan_from_ids",
    "runs_expert_mlp",
    "select_top_c",
    "within_capacity",
]
