"""The arithmetic of routing on bare tensors; usable alone with torch.

`reference` is the specification. `ops` are its differentiable, fastest forms.
"""

from moe_router_kernels.ops import combine, gather, grouped_mm

__all__ = ["combine", "gather", "grouped_mm"]
