"""RMSNorm, in fp32 whatever flows through it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / rms(x) * weight. Source: Zhang & Sennrich 2019, arXiv:1910.07467.

    Args:
        dim: size of the last dimension.
        eps: added to the mean square.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise; returns autocast's dtype if it is on, else x's."""
        device = x.device.type
        autocast = torch.is_autocast_enabled(device)
        # cast once here, or each of q, k and v casts for itself and dispatch sends fp32
        dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
        if x.is_cuda and x.dtype == self.weight.dtype == dtype and not torch.is_grad_enabled():
            # CUDA's kernel computes 16 bit in fp32 and rounds once: one launch in the place of four
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(device, enabled=False):
            y = F.rms_norm(x.to(wide), self.weight.shape, self.weight.to(wide), self.eps)
        return y.to(dtype)
