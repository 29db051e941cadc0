"""Triton: the expert GEMMs. Rows of a group times the matrix of the group, with what stands before
and after fused in: rows are gathered by the load, SwiGLU and its backward run on the accumulators.

Rows are sorted by group, R of them; groups are ragged and may be empty. A tile never crosses a
group (`row_tiles`).
Not covered: K dimensions whose rows are no multiple of 16 bytes (a TMA descriptor wants that).
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_router_kernels.launch import launch
from moe_router_kernels.row_tiles import Rows
from moe_router_kernels.scratch import scratch
from moe_router_kernels.sizes import ceil_div
from moe_router_kernels.tiles import Tile


@triton.jit
def _silu_parts(gate):  # type: ignore[no-untyped-def]
    """silu(gate), and its derivative."""
    # 1 / a as the square of 1 / sqrt(a), a power of 2: five instructions, not thirteen
    root = tl.rsqrt(1.0 + tl.exp2(-1.4426950408889634 * gate))
    sigmoid = root * root
    value = gate * sigmoid
    return value, sigmoid * (1.0 + gate - value)


@triton.jit
def _rows_kernel(  # type: ignore[no-untyped-def]
    a_ptr,  # (rows of a, K)
    src_ptr,  # (R,) int32, row of a for each row; unused unless GATHER
    w_ptr,  # (G, N, K), or (G, K, N) if BACKWARD
    offsets_ptr,
    group_ptr,
    row_ptr,
    used_ptr,
    out_ptr,  # (R, N)
    act_ptr,  # (R, N / 2) of SwiGLU; (R, N) of its backward
    pre_ptr,  # (R, 2 N), read by the backward of SwiGLU; out_ptr may be the same
    weight_ptr,  # (R,) fp32 weight of each row, for the backward
    dot_ptr,  # (tiles of N, R) fp32 partial gradients of those weights
    G, R, K, N,
    stride_a,
    PROGRAMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    GATHER: tl.constexpr,
    BACKWARD: tl.constexpr,
    EPILOGUE: tl.constexpr,  # "none", "swiglu", "swiglu_backward"
    KEEP: tl.constexpr,  # store what SwiGLU is taken of
    PRECISION: tl.constexpr,
    FLATTEN: tl.constexpr,
):  # fmt: skip
    dtype = out_ptr.dtype.element_ty
    swiglu: tl.constexpr = EPILOGUE == "swiglu"
    # gate and up are rows of w, half of N apart: one load brings BLOCK_N of each
    width = N // 2 if swiglu else N
    columns: tl.constexpr = 2 * BLOCK_N if swiglu else BLOCK_N
    tiles_n = tl.cdiv(width, BLOCK_N)
    tiles_m = tl.load(used_ptr)
    size = N.to(tl.int64) * K
    if swiglu:
        w_desc = tl.make_tensor_descriptor(
            w_ptr, [G, 2, width, K], [size, size // 2, K, 1], [1, 2, BLOCK_N, BLOCK_K]
        )
    elif BACKWARD:
        w_desc = tl.make_tensor_descriptor(w_ptr, [G, K, N], [size, N, 1], [1, BLOCK_K, BLOCK_N])
    else:
        w_desc = tl.make_tensor_descriptor(w_ptr, [G, N, K], [size, K, 1], [1, BLOCK_N, BLOCK_K])
    if not GATHER:
        used = tl.load(offsets_ptr + G)  # what lies past it may be NaN
        a_desc = tl.make_tensor_descriptor(a_ptr, [used, K], [stride_a, 1], [BLOCK_M, BLOCK_K])
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, PROGRAMS, flatten=FLATTEN):
        band = tile // (GROUP_M * tiles_n)
        inside = tile - band * GROUP_M * tiles_n
        height = tl.minimum(tiles_m - band * GROUP_M, GROUP_M)
        m = band * GROUP_M + inside % height
        n = (inside // height) * BLOCK_N
        group = tl.load(group_ptr + m)
        row0 = tl.load(row_ptr + m)
        row = row0 + tl.arange(0, BLOCK_M)
        live = row < tl.load(offsets_ptr + group + 1)
        if GATHER:
            src = tl.load(src_ptr + row, mask=live, other=0)
            a_at = a_ptr + src.to(tl.int64)[:, None] * stride_a
        acc = tl.zeros((BLOCK_M, columns), tl.float32)
        for k in range(0, K, BLOCK_K):
            if GATHER:
                column = k + tl.arange(0, BLOCK_K)
                a = tl.load(a_at + column[None, :], mask=(column < K)[None, :], other=0.0)
            else:
                a = a_desc.load([row0, k])
            if swiglu:
                w = w_desc.load([group, 0, n, k]).reshape(columns, BLOCK_K).T
            elif BACKWARD:
                w = w_desc.load([group, k, n]).reshape(BLOCK_K, BLOCK_N)
            else:
                w = w_desc.load([group, n, k]).reshape(BLOCK_N, BLOCK_K).T
            acc = tl.dot(a, w, acc, input_precision=PRECISION)
        column = n + tl.arange(0, BLOCK_N)
        keep = live[:, None] & (column < width)[None, :]
        at = row.to(tl.int64)[:, None] * N + column[None, :]
        if EPILOGUE == "none":
            tl.store(out_ptr + at, acc.to(dtype), mask=keep)
        elif swiglu:
            gate, lift = acc.reshape(BLOCK_M, 2, BLOCK_N).permute(0, 2, 1).split()
            # what is stored is what the backward pass will read
            gate, lift = gate.to(dtype), lift.to(dtype)
            if KEEP:
                tl.store(out_ptr + at, gate, mask=keep)
                tl.store(out_ptr + at + width, lift, mask=keep)
            value, _ = _silu_parts(gate.to(tl.float32))
            act_at = row.to(tl.int64)[:, None] * width + column[None, :]
            tl.store(act_ptr + act_at, (value * lift.to(tl.float32)).to(dtype), mask=keep)
        else:
            weight = tl.load(weight_ptr + row, mask=live, other=0.0)
            dot = tl.zeros((BLOCK_M,), tl.float32)
            # a few columns at a time: the whole tile's intermediates do not fit into registers;
            # what they read comes one part ahead
            parts: tl.constexpr = 8 if BLOCK_N > 128 else 4
            part: tl.constexpr = BLOCK_N // parts
            pre_at = pre_ptr + row.to(tl.int64)[:, None] * (2 * N)
            gate, lift = _pre_activations(pre_at, live, n, N, part)
            for i in tl.static_range(parts):
                first = n + i * part
                if i + 1 < parts:
                    next_gate, next_lift = _pre_activations(pre_at, live, first + part, N, part)
                dot += _swiglu_backward(
                    _part(acc, i, parts), gate, lift, weight, row, live, first, out_ptr, act_ptr,
                    N, part,
                )  # fmt: skip
                if i + 1 < parts:
                    gate, lift = next_gate, next_lift
            tl.store(dot_ptr + (n // BLOCK_N).to(tl.int64) * R + row, dot, mask=live)


@triton.jit
def _part(acc, INDEX: tl.constexpr, PARTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Columns of acc, one of 4 or 8 equal parts."""
    levels: tl.constexpr = 3 if PARTS == 8 else 2
    for level in tl.static_range(levels):
        low, high = acc.reshape(acc.shape[0], 2, acc.shape[1] // 2).permute(0, 2, 1).split()
        acc = high if (INDEX >> (levels - 1 - level)) % 2 == 1 else low
    return acc


@triton.jit
def _pre_activations(  # type: ignore[no-untyped-def]
    pre_at, live, first, N, COLUMNS: tl.constexpr
):
    column = first + tl.arange(0, COLUMNS)
    keep = live[:, None] & (column < N)[None, :]
    # volatile: else the compiler moves them back to where they are used
    gate = tl.load(pre_at + column[None, :], mask=keep, other=0.0, volatile=True)
    return gate, tl.load(pre_at + N + column[None, :], mask=keep, other=0.0, volatile=True)


@triton.jit
def _swiglu_backward(  # type: ignore[no-untyped-def]
    acc, gate, lift, weight, row, live, first, out_ptr, act_ptr, N, COLUMNS: tl.constexpr
):
    """Store gradient and weighted activation of some columns; return their part of the dot."""
    dtype = out_ptr.dtype.element_ty
    column = first + tl.arange(0, COLUMNS)
    keep = live[:, None] & (column < N)[None, :]
    pre_at = row.to(tl.int64)[:, None] * (2 * N) + column[None, :]
    lift = lift.to(tl.float32)
    value, slope = _silu_parts(gate.to(tl.float32))
    act = value * lift
    act_at = row.to(tl.int64)[:, None] * N + column[None, :]
    tl.store(act_ptr + act_at, (weight[:, None] * act).to(dtype), mask=keep)
    scaled = acc * weight[:, None]
    tl.store(out_ptr + pre_at, (scaled * lift * slope).to(dtype), mask=keep)
    tl.store(out_ptr + pre_at + N, (scaled * value).to(dtype), mask=keep)
    return tl.sum(acc * act, 1)


@triton.jit
def _weights_kernel(  # type: ignore[no-untyped-def]
    a_ptr,  # (rows of a, M)
    b_ptr,  # (rows of b, N)
    src_ptr,  # (R,) int32, row of the gathered one for each row
    offsets_ptr,
    out_ptr,  # (G, M, N), or (G, N, M): a transposed times b, over the rows of each group
    G, M, N,
    tiles,
    stride_a,
    stride_b,
    PROGRAMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    GATHER_A: tl.constexpr,  # else b is gathered
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    per_group = tiles_m * tiles_n
    used = tl.load(offsets_ptr + G)  # what lies past it may be NaN
    if GATHER_A:
        desc = tl.make_tensor_descriptor(b_ptr, [used, N], [stride_b, 1], [BLOCK_K, BLOCK_N])
    else:
        desc = tl.make_tensor_descriptor(a_ptr, [used, M], [stride_a, 1], [BLOCK_K, BLOCK_M])
    for tile in tl.range(tl.program_id(0), tiles, PROGRAMS):
        group = tile // per_group
        inside = tile - group * per_group
        band = inside // (GROUP_M * tiles_n)
        left = inside - band * GROUP_M * tiles_n
        height = tl.minimum(tiles_m - band * GROUP_M, GROUP_M)
        m = (band * GROUP_M + left % height) * BLOCK_M
        n = (left // height) * BLOCK_N
        first, last = tl.load(offsets_ptr + group), tl.load(offsets_ptr + group + 1)
        at_m, at_n = m + tl.arange(0, BLOCK_M), n + tl.arange(0, BLOCK_N)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        row = first + tl.arange(0, BLOCK_K)
        next_src = tl.load(src_ptr + row, mask=row < last, other=0)
        for k in range(first, last, BLOCK_K):
            # rows of the next group that the descriptor brings meet zeros here
            live = k + tl.arange(0, BLOCK_K) < last
            src = next_src.to(tl.int64)[:, None]
            # one step ahead: a load that waits for a load is not pipelined deeply
            row = k + BLOCK_K + tl.arange(0, BLOCK_K)
            next_src = tl.load(src_ptr + row, mask=row < last, other=0)
            if GATHER_A:
                keep = live[:, None] & (at_m < M)[None, :]
                a = tl.load(a_ptr + src * stride_a + at_m[None, :], mask=keep, other=0.0)
                b = desc.load([k, n])
            else:
                keep = live[:, None] & (at_n < N)[None, :]
                a = desc.load([k, m])
                b = tl.load(b_ptr + src * stride_b + at_n[None, :], mask=keep, other=0.0)
            acc = tl.dot(a.T, b, acc, input_precision=PRECISION)
        stride_m, stride_n = (1, M) if TRANSPOSED else (N, 1)
        out_at = group.to(tl.int64) * M * N + at_m[:, None] * stride_m + at_n[None, :] * stride_n
        keep = (at_m < M)[:, None] & (at_n < N)[None, :]
        tl.store(out_ptr + out_at, acc.to(out_ptr.dtype.element_ty), mask=keep)


@cache
def _programs(device: torch.device) -> int:
    """One for each multiprocessor: they take tiles until none is left."""
    if device.type != "cuda":
        return 4  # the interpreter runs them one after another
    return torch.cuda.get_device_properties(device).multi_processor_count


def rows_times_groups(
    a: Tensor,
    w: Tensor,
    rows: Rows,
    *,
    src_R: Tensor | None = None,
    backward: bool = False,
    epilogue: str = "none",
    keep: bool = True,
    pre_RF: Tensor | None = None,
    overwrite: bool = False,
    weight_R: Tensor | None = None,
    tile: Tile,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Rows of group g times w[g] transposed, as a linear layer does; or times w[g], backward.

    Args:
        a: (R, K), or (T, K) if `src_R` says which row of it each row is.
        w: (G, N, K), or (G, K, N) if backward; contiguous.
        rows: of `row_tiles.cut`, for the tile's m.
        epilogue: `swiglu`: w are gate and up, N / 2 rows each, the second result silu(gate) * up.
            `swiglu_backward`: the product is the gradient of that second result; pre_RF is what
            came out first, weight_R the weight of each row.
        overwrite: with `swiglu_backward`: put the first result where pre_RF is.
        keep: with `swiglu`: give the first result, which only the backward pass needs.

    Returns:
        out (R, N), and by epilogue: act (R, N / 2); for the backward out is the gradient (R, 2 N)
        of pre, act (R, N) is weight * silu(gate) * up, and dot (R,) fp32 the gradient of the
        weight. Rows past the last group are unspecified.
    """
    G, N, K = w.shape
    if backward:
        N, K = K, N
    back = epilogue == "swiglu_backward"
    width = N // 2 if epilogue == "swiglu" else N
    R = rows.rows
    act = None if epilogue == "none" else a.new_empty(R, width)
    if pre_RF is not None and overwrite:
        out = pre_RF
    else:
        out = a.new_empty(R if keep else 0, 2 * N if back else N)
    dot = None
    if back:
        dot = torch.zeros(ceil_div(N, tile.n), R, device=a.device)
    if a.device.type == "cuda":
        triton.set_allocator(scratch)
    none = out
    launch(
        _rows_kernel, (_programs(a.device),),
        a, none if src_R is None else src_R, w,
        rows.offsets_G1, rows.group_N, rows.row_N, rows.used,
        out, none if act is None else act, none if pre_RF is None else pre_RF,
        none if weight_R is None else weight_R, none if dot is None else dot,
        G, R, K, N, a.stride(0),
        PROGRAMS=_programs(a.device), BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k,
        GROUP_M=tile.band, GATHER=src_R is not None, BACKWARD=backward,
        EPILOGUE=epilogue, KEEP=keep, FLATTEN=tile.flatten,
        PRECISION="ieee" if a.dtype == torch.float32 else "tf32",
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out, act, None if dot is None else dot.sum(0)


def group_weights(
    a: Tensor,
    b: Tensor,
    offsets_G1: Tensor,
    *,
    src_R: Tensor,
    gather: str,
    transposed: bool = False,
    dtype: torch.dtype,
    tile: Tile,
) -> Tensor:
    """(G, M, N): a transposed times b over the rows of each group; 0 for an empty one.

    Args:
        a, b: (R, M) and (R, N); the one that `gather` names is (T, ...), read by src_R.
        gather: `a` or `b`.
        transposed: give (G, N, M) instead.
        dtype: of the result.
    """
    G, M, N = offsets_G1.numel() - 1, a.size(1), b.size(1)
    out = a.new_empty((G, N, M) if transposed else (G, M, N), dtype=dtype)
    count = G * ceil_div(M, tile.m) * ceil_div(N, tile.n)
    programs = min(count, _programs(a.device))
    if a.device.type == "cuda":
        triton.set_allocator(scratch)
    launch(
        _weights_kernel, (programs,),
        a, b, src_R, offsets_G1, out, G, M, N, count, a.stride(0), b.stride(0),
        PROGRAMS=programs, BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, GROUP_M=tile.band,
        GATHER_A=gather == "a", TRANSPOSED=transposed,
        PRECISION="ieee" if a.dtype == torch.float32 else "tf32",
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out
