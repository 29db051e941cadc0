"""Attention of single queries to slots of a paged cache that lie anywhere, in plain torch."""

import torch
from torch import Tensor

from moe_router_kernels import reference

AT_ONCE = 1 << 26  # numbers gathered from a cache for one product


def attend_slots(
    q_THC: Tensor,
    pages_2NJSC: Tensor,
    table_BM: Tensor,
    row_T: Tensor,
    slot_TJX: Tensor,
    seen_TJX: Tensor,
    weight_TJX: Tensor | None = None,
) -> Tensor:
    """(T, H, C): each query to slots of its sequence, a list for each KV head.

    Args:
        pages_2NJSC, table_BM: the cache, see `reference_pages`.
        row_T: the sequence of each query.
        slot_TJX: int64, of them; where not seen, any slot that has a page.
        seen_TJX: bool, which are attended to, at least one.
        weight_TJX: by what shares of the softmax are multiplied; None: 1.
    """
    (T, J, _), (H, C), S = slot_TJX.shape, q_THC.shape[1:], pages_2NJSC.size(3)
    head_J1 = torch.arange(J, device=slot_TJX.device)[:, None]
    page_TJX = table_BM[row_T[:, None, None], slot_TJX // S]
    k, v = (reference.wide(x) for x in pages_2NJSC[:, page_TJX, head_J1, slot_TJX % S])
    score = reference.wide(q_THC).view(T, J, H // J, C) @ k.transpose(2, 3)
    share = (score * C**-0.5).masked_fill(~seen_TJX[:, :, None], float("-inf")).softmax(-1)
    if weight_TJX is not None:
        share = share * weight_TJX[:, :, None]
    out_THC: Tensor = (share @ v).flatten(1, 2).to(q_THC.dtype)
    return out_THC
