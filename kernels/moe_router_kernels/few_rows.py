"""Triton: experts of so few rows that each reads its weights alone, as in decoding one token.

A tensor core's tile would be a sixteenth full, and its tiles too few for the multiprocessors: here
a program multiplies a few rows of a matrix with one vector, and there are thousands of programs.
Two launches: gate, up and SwiGLU; then down and the weighted sum over the choices of a token.
Specification: `reference.grouped_mm`, `combine`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_router_kernels.launch import launch
from moe_router_kernels.sizes import ceil_div, next_power_of_2
from moe_router_kernels.tiles import Few

Plan = tuple[Tensor, Tensor, Tensor, Tensor]


@triton.jit
def _group_of(row, offsets_ptr, G, G_PAD: tl.constexpr):  # type: ignore[no-untyped-def]
    """The group that a row belongs to: as many groups as end before it, which may be empty."""
    group = tl.arange(0, G_PAD)
    end = tl.load(offsets_ptr + 1 + group, mask=group < G, other=2**31 - 1)
    return tl.sum((end <= row).to(tl.int32), 0)


@triton.jit
def _up_kernel(  # type: ignore[no-untyped-def]
    x_ptr, ids_ptr, src_ptr, w_ptr, offsets_ptr, act_ptr, G, F, D, K,
    PLANNED: tl.constexpr, G_PAD: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """ROWS activations of one row: silu(gate x) * up x."""
    dtype = act_ptr.dtype.element_ty
    row = tl.program_id(1)
    if PLANNED:
        group = _group_of(row, offsets_ptr, G, G_PAD)
        token = tl.load(src_ptr + row)
    else:
        group = tl.load(ids_ptr + row)
        token = row // K
    if (group >= 0) & (group < G):
        x_at = x_ptr + token.to(tl.int64) * D
        f = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        gate_at = w_ptr + (group.to(tl.int64) * 2 * F + f)[:, None] * D
        gate = tl.zeros((ROWS, BLOCK_D), tl.float32)
        lift = tl.zeros((ROWS, BLOCK_D), tl.float32)
        for first in range(0, D, BLOCK_D):
            d = first + tl.arange(0, BLOCK_D)
            inside = (f < F)[:, None] & (d < D)[None, :]
            x = tl.load(x_at + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
            at = gate_at + d[None, :]
            gate += tl.load(at, mask=inside, other=0.0).to(tl.float32) * x
            lift += tl.load(at + F.to(tl.int64) * D, mask=inside, other=0.0).to(tl.float32) * x
        # rounded where the tiled kernel rounds
        total = tl.sum(gate, 1).to(dtype).to(tl.float32)
        act = total / (1.0 + tl.exp(-total)) * tl.sum(lift, 1).to(dtype).to(tl.float32)
        tl.store(act_ptr + row.to(tl.int64) * F + f, act.to(dtype), mask=f < F)


@triton.jit
def _down_kernel(  # type: ignore[no-untyped-def]
    act_ptr, w_ptr, ids_ptr, offsets_ptr, row_ptr, weight_ptr, out_ptr, G, F, D,
    PLANNED: tl.constexpr, K: tl.constexpr, G_PAD: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_F: tl.constexpr,
):  # fmt: skip
    """ROWS channels of one token, over all its choices in order of k."""
    token = tl.program_id(1)
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((ROWS, BLOCK_F), tl.float32)
    for k in tl.static_range(K):
        row = token * K + k
        weight = tl.load(weight_ptr + row).to(tl.float32)
        if PLANNED:
            row = tl.load(row_ptr + row)
            group = tl.where(row < 0, -1, _group_of(row, offsets_ptr, G, G_PAD))
        else:
            group = tl.load(ids_ptr + row)
        if (group >= 0) & (group < G):
            w_at = w_ptr + (group.to(tl.int64) * D + n)[:, None] * F
            for first in range(0, F, BLOCK_F):
                f = first + tl.arange(0, BLOCK_F)
                inside = (n < D)[:, None] & (f < F)[None, :]
                act = tl.load(act_ptr + row.to(tl.int64) * F + f, mask=f < F, other=0.0)
                w = tl.load(w_at + f[None, :], mask=inside, other=0.0).to(tl.float32)
                total += w * (act.to(tl.float32) * weight)[None, :]
    out = tl.sum(total, 1).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + token.to(tl.int64) * D + n, out, mask=n < D)


def forward(
    x_TD: Tensor,
    weight_TK: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *,
    ids_TK: Tensor | None = None,
    plan: Plan | None = None,
    few: Few,
) -> Tensor:
    """(T, D): each token's sum of weight * down(silu(gate x) * up x); all contiguous.

    Args:
        ids_TK: integers, the group of each choice; what is no group adds nothing. Or `plan`.
    """
    (G, D, F), (T, K), planned = down.shape, weight_TK.shape, plan is not None
    none = weight_TK
    ids = none if ids_TK is None else ids_TK
    src_R, _, offsets_G1, row_TK = plan or (none, none, none, none)
    act_RF, out_TD = x_TD.new_empty(T * K, F), torch.empty_like(x_TD)
    pad = next_power_of_2(G)
    launch(
        _up_kernel, (ceil_div(F, few.rows), T * K),
        x_TD, ids, src_R, gate_up, offsets_G1, act_RF, G, F, D, K,
        PLANNED=planned, G_PAD=pad, ROWS=few.rows,
        BLOCK_D=min(few.span, next_power_of_2(D)), num_warps=few.warps,
    )  # fmt: skip
    launch(
        _down_kernel, (ceil_div(D, few.rows), T),
        act_RF, down, ids, offsets_G1, row_TK, weight_TK, out_TD, G, F, D,
        PLANNED=planned, K=K, G_PAD=pad, ROWS=few.rows,
        BLOCK_F=min(few.span, next_power_of_2(F)), num_warps=few.warps,
    )  # fmt: skip
    return out_TD
