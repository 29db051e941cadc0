"""Triton: the logit of a router in depth, one launch in the place of a dozen. Specification:
`reference.rms_logit`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_router_kernels.launch import launch
from moe_router_kernels.sizes import next_power_of_2


@triton.jit
def _rms_logit_kernel(  # type: ignore[no-untyped-def]
    x_ptr, w_ptr, bias_ptr, logit_ptr, D, stride_x, eps, BLOCK: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    square = tl.zeros((BLOCK,), tl.float32)
    product = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, D, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < D
        x = tl.load(x_ptr + token * stride_x + column, mask=inside, other=0.0).to(tl.float32)
        w = tl.load(w_ptr + column, mask=inside, other=0.0).to(tl.float32)
        square += x * x
        product += x * w
    scale = tl.rsqrt(tl.sum(square, 0) / D + eps)
    bias = tl.load(bias_ptr).to(tl.float32)
    tl.store(logit_ptr + token, tl.sum(product, 0) * scale + bias)


def rms_logit(x_TD: Tensor, weight_1D: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(T,) fp32; x has unit stride over D."""
    T, D = x_TD.shape
    logit_T = torch.empty(T, device=x_TD.device)
    if T:
        block = min(2048, next_power_of_2(D))
        launch(
            _rms_logit_kernel, (T,),
            x_TD, weight_1D.contiguous(), bias, logit_T, D, x_TD.stride(0), eps, BLOCK=block,
            num_warps=4,
        )  # fmt: skip
    return logit_T
