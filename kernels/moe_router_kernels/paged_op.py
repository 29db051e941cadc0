"""A paged cache on bare tensors: Triton on a GPU, else its specification. Without gradients."""

from torch import Tensor

from moe_router_kernels import reference_pages
from moe_router_kernels.choose import uses_triton

CHANNELS = (16, 32, 64, 128)  # of a head: the powers of two whose pages fit into shared memory
SLOTS = (16, 32, 64, 128)  # of a page


def store(
    q_THC: Tensor,
    k_TJC: Tensor,
    v_TJC: Tensor,
    cos_T1C: Tensor,
    sin_T1C: Tensor,
    pages_2NJSC: Tensor,
    table_BM: Tensor,
    row_T: Tensor,
    slot_T: Tensor,
    kernels: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Turn queries and keys by their positions, and write keys and values into the cache.

    Args:
        cos_T1C, sin_T1C: fp32; sines carry the sign of their half.
        pages_2NJSC: of v's dtype; changed.
        table_BM: int32, the pages of each sequence.
        row_T, slot_T: integers: the sequence of each token, and where it goes in it.
        kernels: see `choose.uses_triton`.

    Returns:
        The turned queries and keys, of v's dtype.
    """
    if uses_triton("paged cache", kernels, q_THC.device, _uncovered(q_THC, pages_2NJSC)):
        from moe_router_kernels import paged_attention

        tensors = (q_THC, k_TJC, v_TJC, cos_T1C, sin_T1C, pages_2NJSC, table_BM, row_T, slot_T)
        return paged_attention.store(*tensors)
    q_THC, k_TJC = (
        reference_pages.turn(x, cos_T1C, sin_T1C).to(v_TJC.dtype) for x in (q_THC, k_TJC)
    )
    reference_pages.store(k_TJC, v_TJC, pages_2NJSC, table_BM, row_T, slot_T)
    return q_THC, k_TJC


def attend_pages(
    q_THC: Tensor,
    pages_2NJSC: Tensor,
    table_BM: Tensor,
    row_T: Tensor,
    seen_T: Tensor,
    kernels: str = "auto",
) -> Tensor:
    """Attention of single queries to a paged cache.

    Args:
        q_THC: H a multiple of the cache's J KV heads; query head h reads KV head h // (H / J).
        table_BM: int32, the pages of each sequence.
        row_T: integers, the sequence of each query.
        seen_T: integers, at least 1: the slots of it that the query attends to.
        kernels: see `choose.uses_triton`.

    Returns:
        (T, H, C) of q's dtype.
    """
    if uses_triton("paged attention", kernels, q_THC.device, _uncovered(q_THC, pages_2NJSC)):
        from moe_router_kernels import paged_attention

        return paged_attention.attend(q_THC, pages_2NJSC, table_BM, row_T, seen_T)
    return reference_pages.attend(q_THC, pages_2NJSC, table_BM, row_T, seen_T)


def _uncovered(q_THC: Tensor, pages_2NJSC: Tensor) -> str:
    channels, slots = q_THC.size(2), pages_2NJSC.size(3)
    if channels not in CHANNELS or slots not in SLOTS:
        return f"heads of {channels} channels, pages of {slots} slots: no powers of two, 16 to 128"
    if q_THC.dtype.itemsize == 8:
        return "fp64"
    return ""
