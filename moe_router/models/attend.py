"""Attention of packed sequences on bare tensors. H query heads, J key and value heads, C channels
of a head.

Query head h reads key head h // (H / J). Two ways, one result up to rounding: torch's packed flash
kernel (CUDA, 16 bit), and few padded calls (everything else).
"""

import inspect
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_router.models.packing import Packing, Piece
from moe_router_kernels import reference

HALF = (torch.bfloat16, torch.float16)


def attend_packed(
    q_THC: Tensor,
    k_TJC: Tensor,
    v_TJC: Tensor,
    packing: Packing,
    size_T: Tensor | None = None,
) -> Tensor:
    """Each token attends to itself and the earlier tokens of its sequence, or to all of it.

    Args:
        size_T: fp32, above 0, where attention is not causal: a key of size s is seen as s
            equal ones, so log(s) is added to its scores (Bolya et al. 2022, arXiv:2210.09461,
            equation 1). None: 1 each.

    Returns:
        (T, H, C) of q's dtype.
    """
    if packing.tokens == 0:
        # nothing, but keys and values take part: FSDP2 wants the same gradients on every rank
        return q_THC + k_TJC.sum() + v_TJC.sum()
    if runs_flash(q_THC):
        if size_T is None:
            return flash(packing.causal)(q_THC, k_TJC, v_TJC, packing)
        more = _more_channels(q_THC, k_TJC, v_TJC, size_T)
        return flash(packing.causal)(*more, packing)[..., : q_THC.size(-1)]
    sizes = [piece.tokens for piece in packing.pieces]
    if packing.is_bounded:  # rows of no token come last
        none = packing.tokens - sum(sizes)
        q_THC, k_TJC, v_TJC = (x[: len(x) - none] for x in (q_THC, k_TJC, v_TJC))
    # split, not slices: its backward is one concatenation
    q_parts, k_parts, v_parts = (torch.split(x, sizes) for x in (q_THC, k_TJC, v_TJC))
    masks = [piece.mask_R1WW for piece in packing.pieces]
    if size_T is not None:
        logs = torch.split(size_T.log().to(q_THC.dtype), sizes)
        masks = [_seen_by_size(p, log) for p, log in zip(packing.pieces, logs, strict=True)]
    parts = zip(q_parts, k_parts, v_parts, packing.pieces, masks, strict=True)
    out = [_attend_piece(*part, packing.causal) for part in parts]
    if packing.is_bounded:
        out.append(q_THC.new_zeros(none, *q_THC.shape[1:]))
    return out[0] if len(out) == 1 else torch.cat(out)


def runs_flash(q_THC: Tensor) -> bool:
    """Whether torch's packed kernel takes these queries."""
    return q_THC.is_cuda and q_THC.dtype in HALF and q_THC.size(-1) % 8 == 0


def received(
    q_THC: Tensor, k_TJC: Tensor, packing: Packing, size_T: Tensor | None = None
) -> Tensor:
    """(T,) how much attention comes to each token: its probabilities, mean over heads, summed over
    the queries of its sequence by their size. 1 is what attention to all alike would give.

    Source: Kim et al. 2021 (arXiv:2107.00910), times the length of the sequence.
    """
    size_T = torch.ones_like(q_THC[:, 0, 0]).float() if size_T is None else size_T
    with torch.autocast(q_THC.device.type, enabled=False):
        q_THC, k_THC = (
            reference.wide(x)
            for x in (q_THC, k_TJC.repeat_interleave(q_THC.size(1) // k_TJC.size(1), 1))
        )
        sizes = [piece.tokens for piece in packing.pieces]
        parts = zip(
            *(torch.split(x, sizes) for x in (q_THC, k_THC, size_T)), packing.pieces, strict=True
        )
        out = [_received_in(*part) for part in parts]
    return torch.cat(out) if out else size_T


def _received_in(q_THC: Tensor, k_THC: Tensor, size_T: Tensor, piece: Piece) -> Tensor:
    q, k = (_grid(x, piece).transpose(1, 2) for x in (q_THC, k_THC))
    bias = _seen_by_size(piece, size_T.log().to(q.dtype))
    weight_RHWW = (q @ k.transpose(2, 3) * q.size(-1) ** -0.5 + bias).softmax(-1)
    by_RW = _grid(size_T.to(q.dtype), piece)
    got_RW = torch.einsum("rhqk,rq->rk", weight_RHWW, by_RW) / q.size(1)
    return got_RW.flatten() if piece.cell_T is None else got_RW.flatten()[piece.cell_T]


def _more_channels(
    q_THC: Tensor, k_TJC: Tensor, v_TJC: Tensor, size_T: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """For a kernel that takes no mask: log(size) comes to the scores through one more channel;
    eight, for kernels want channels by eights, and values as wide as keys."""
    T, H, C = q_THC.shape
    first_X = (torch.arange(8, device=q_THC.device) == 0).to(q_THC.dtype)
    root = (C + 8) ** 0.5  # by which the kernel divides scores
    q_THX = torch.cat([q_THC * (root / C**0.5), (first_X * root).expand(T, H, -1)], -1)
    log_TX = size_T.log().to(k_TJC.dtype)[:, None] * first_X
    k_TJX = torch.cat([k_TJC, log_TX[:, None].expand(-1, k_TJC.size(1), -1)], -1)
    return q_THX, k_TJX, F.pad(v_TJC, (0, 8))


def _seen_by_size(piece: Piece, log_T: Tensor) -> Tensor:
    """(R, 1, W, W) what is added to the scores of a piece: log(size) of the key, -inf if unseen."""
    bias_R11W = _grid(log_T, piece)[:, None, None]
    if piece.mask_R1WW is None:
        return bias_R11W.expand(-1, -1, piece.width, -1)
    return torch.where(piece.mask_R1WW, bias_R11W, -torch.inf)


def _grid(x_T: Tensor, piece: Piece) -> Tensor:
    """(T, ...) to (rows, width, ...); 0 in cells of no token."""
    cells = x_T
    if piece.cell_T is not None:
        cells = x_T.new_zeros(piece.rows * piece.width, *x_T.shape[1:])
        cells = cells.index_copy(0, piece.cell_T, x_T)
    return cells.view(piece.rows, piece.width, *x_T.shape[1:])


def _attend_piece(
    q_THC: Tensor,
    k_TJC: Tensor,
    v_TJC: Tensor,
    piece: Piece,
    mask_R1WW: Tensor | None,
    causal: bool,
) -> Tensor:

    repeat = q_THC.size(1) // k_TJC.size(1)
    if q_THC.is_cuda and repeat > 1:  # CUDA's fp32 kernels know no grouped heads
        k_TJC, v_TJC = (x.repeat_interleave(repeat, 1) for x in (k_TJC, v_TJC))
        repeat = 1
    q, k, v = (_grid(x, piece).transpose(1, 2) for x in (q_THC, k_TJC, v_TJC))
    y = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask_R1WW, is_causal=causal and mask_R1WW is None, enable_gqa=repeat > 1
    )
    y_TNC = y.transpose(1, 2).reshape(-1, *q_THC.shape[1:])
    return y_TNC if piece.cell_T is None else y_TNC[piece.cell_T]


@cache
def flash(causal: bool) -> Callable[..., Tensor]:
    """torch's packed kernel, of queries, keys and values and how they are packed. Where sequences
    have more keys than queries, the last ones belong together. Imported on first use: it takes a
    second and torch._dynamo.
    """
    from torch.nn.attention.varlen import varlen_attn

    # 2.11 takes fewer key heads as they come, 2.13 wants to be told
    wants_word = "enable_gqa" in inspect.signature(varlen_attn).parameters
    word = {"enable_gqa": True} if wants_word else {}
    packed: Any = varlen_attn
    window = (-1, 0) if causal else (-1, -1)  # any way back; none ahead, or any
    attention = partial(packed, window_size=window, **word)

    def attend(
        q_THC: Tensor, k_TJC: Tensor, v_TJC: Tensor, packing: Packing, keys: Packing | None = None
    ) -> Tensor:
        keys = keys or packing
        # queries of one token each it takes for a decode, in which every sequence has one
        one_each = packing.tokens == packing.sequences and not packing.is_bounded
        longest = packing.longest if one_each else max(2, packing.longest)
        bounds = packing.offsets_B1, keys.offsets_B1, longest, keys.longest
        y_THC: Tensor = attention(q_THC, k_TJC, v_TJC, *bounds)
        return y_THC

    return attend
