"""The specification of a paged cache, in plain torch: keys and values into pages, and attention of
single tokens to them.

T tokens, H query heads, J KV heads, C channels of a head. A cache is N pages of S slots; row b of a
table names the M pages of a sequence in order, so slot s of it lies in page table[b, s // S].
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def turn(x_THC: Tensor, cos_T1C: Tensor, sin_T1C: Tensor) -> Tensor:
    """Rotate the two halves of a head; sines carry their sign. In fp32 at least.

    Source: Su et al. 2021, arXiv:2104.09864.
    """
    return x_THC * cos_T1C + x_THC.roll(x_THC.size(-1) // 2, -1) * sin_T1C


def store(
    k_TJC: Tensor, v_TJC: Tensor, pages_2NJSC: Tensor, table_BM: Tensor, row_T: Tensor,
    slot_T: Tensor,
) -> None:  # fmt: skip
    """Write each token's key and value to its slot."""
    S = pages_2NJSC.size(3)
    page_T, inside_T = table_BM[row_T, slot_T // S].long(), slot_T.long() % S
    pages_2NJSC[0, page_T, :, inside_T] = k_TJC
    pages_2NJSC[1, page_T, :, inside_T] = v_TJC


def read(pages_2NJSC: Tensor, table_BM: Tensor, length_B: Tensor) -> tuple[Tensor, Tensor]:
    """(B, J, M * S, C) keys and values, 0 in slots past a sequence's length: what another sequence
    left there may be anything."""
    k, v = pages_2NJSC[:, table_BM.long()].transpose(3, 2).flatten(3, 4).unbind(0)
    unused_B1S1 = torch.arange(k.size(2), device=k.device) >= length_B[:, None]
    return tuple(x.masked_fill(unused_B1S1[:, None, :, None], 0) for x in (k, v))  # type: ignore[return-value]


def gather(
    pages_2NJSC: Tensor, table_BM: Tensor, row_T: Tensor, slot_T: Tensor
) -> tuple[Tensor, Tensor]:
    """(T, J, C) keys and values in these slots: what `store` wrote there."""
    S = pages_2NJSC.size(3)
    page_T, inside_T = table_BM[row_T, slot_T // S].long(), slot_T.long() % S
    return pages_2NJSC[0, page_T, :, inside_T], pages_2NJSC[1, page_T, :, inside_T]


def attend(
    q_THC: Tensor, pages_2NJSC: Tensor, table_BM: Tensor, row_T: Tensor, seen_T: Tensor
) -> Tensor:
    """(T, H, C): each query attends to the first `seen_T` slots of its sequence."""
    (T, H, C), J, S = q_THC.shape, pages_2NJSC.size(2), pages_2NJSC.size(3)
    if T == 0:
        return q_THC
    most = -(-int(seen_T.max()) // S)
    k_TJSC, v_TJSC = read(pages_2NJSC, table_BM[row_T, :most], seen_T)
    seen_TS = torch.arange(k_TJSC.size(2), device=seen_T.device) < seen_T[:, None]
    # the H / J query heads of a KV head are rows of one matrix: nothing is repeated
    y_TJXC = F.scaled_dot_product_attention(
        q_THC.view(T, J, H // J, C), k_TJSC, v_TJSC, attn_mask=seen_TS[:, None, None]
    )
    return y_TJXC.reshape(T, H, C)
