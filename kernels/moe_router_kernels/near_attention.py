"""Attention to the tokens right before a query and to the first ones of its sequence, but for those
of its own cluster: what `cluster_attention` adds to clusters. Plain torch: a block of queries
gathers a band of keys; no pair beyond it is computed."""

from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moe_router_kernels.reference import wide

AT_ONCE = 1 << 27  # scores
NONE = -1e30  # score of no key: finite, or its gradient would be NaN


class Band:
    """Which keys the queries of each block look through; N blocks, Q queries, S keys.

    Args:
        first_N, last_N: int32, where each block begins and ends; none is longer than `block`.
        low_N: int32, where its sequence begins.
        tokens: T.

    Attributes:
        query_NQ, key_NS: int64, tokens; past the end of the block, or none, any.
        cell_T: int64, where each token is among the N Q queries.
    """

    def __init__(
        self,
        first_N: Tensor,
        last_N: Tensor,
        low_N: Tensor,
        block: int,
        window: int,
        global_tokens: int,
        tokens: int,
    ) -> None:
        device = first_N.device
        first_N1, last_N1, low_N1 = (x.long()[:, None] for x in (first_N, last_N, low_N))
        query_NQ = first_N1 + torch.arange(block, device=device)
        near_NS = first_N1 + torch.arange(-window, block, device=device)
        begin_NS = low_N1 + torch.arange(global_tokens, device=device)
        live_NQ = query_NQ < last_N1
        # the first tokens, where the band does not hold them
        there = (near_NS >= low_N1) & (near_NS < last_N1), begin_NS < first_N1 - window
        key_NS, there_NS = torch.cat([near_NS, begin_NS], 1), torch.cat(there, 1)
        behind_NQS = query_NQ[:, :, None] - key_NS[:, None]
        first_NS = key_NS < low_N1 + global_tokens
        seen_NQS = (behind_NQS >= 0) & ((behind_NQS <= window) | first_NS[:, None])
        self._seen_NQS = seen_NQS & there_NS[:, None] & live_NQ[:, :, None]
        # what is not there may lie anywhere: it is not seen
        self.query_NQ = torch.where(live_NQ, query_NQ, first_N1)
        self.key_NS = torch.where(there_NS, key_NS, first_N1)
        token_T = torch.arange(tokens, device=device)
        block_T = torch.searchsorted(last_N1[:, 0], token_T, right=True)
        self.cell_T = block_T * block + token_T - first_N1[block_T, 0]

    def seen(self, cluster_TJ: Tensor, some: slice = slice(None)) -> Tensor:
        """(N, J, Q, S) bool: near or global, and of another cluster.

        Args:
            some: of the N blocks.
        """
        of_query = cluster_TJ[self.query_NQ[some]].transpose(1, 2)
        of_key = cluster_TJ[self.key_NS[some]].transpose(1, 2)
        return self._seen_NQS[some][:, None] & (of_query[..., None] != of_key[:, :, None])


def attend_near(
    q_THd: Tensor, k_TJd: Tensor, v_TJd: Tensor, cluster_TJ: Tensor, band: Band
) -> tuple[Tensor, Tensor]:
    """(T, H, d), and (T, H), the log of the sum of the exponentials of a query's scores: about
    -1e30 where it sees nobody.

    Args:
        cluster_TJ: the cluster of each token for each KV head.
    """
    inputs = (q_THd, k_TJd, v_TJd, cluster_TJ, band)
    (N, Q), S = band.query_NQ.shape, band.key_NS.size(1)
    few = max(1, AT_ONCE // (q_THd.size(1) * Q * S))
    if few >= N:
        parts = [_attend_some(*inputs, slice(None))]
    else:  # scores of all would not fit: those of some at a time, made again in the backward pass
        again = partial(checkpoint, _attend_some, use_reentrant=False, preserve_rng_state=False)
        parts = [again(*inputs, slice(at, at + few)) for at in range(0, N, few)]
    out, lse = (torch.cat(of) for of in zip(*parts, strict=True))
    return out[band.cell_T], lse[band.cell_T]


def _attend_some(
    q_THd: Tensor, k_TJd: Tensor, v_TJd: Tensor, cluster_TJ: Tensor, band: Band, some: slice
) -> tuple[Tensor, Tensor]:
    """For the queries of some blocks, N Q of them."""
    (_, H, d), J, query_NQ = q_THd.shape, k_TJd.size(1), band.query_NQ[some]
    (N, Q), G = query_NQ.shape, H // J
    q_NJXd = q_THd[query_NQ].view(N, Q, J, G * d).transpose(1, 2).reshape(N, J, -1, d)
    k_NJSd, v_NJSd = (wide(x[band.key_NS[some]].transpose(1, 2)) for x in (k_TJd, v_TJd))
    score = (wide(q_NJXd) @ k_NJSd.transpose(2, 3) * d**-0.5).view(N, J, Q, G, -1)
    score = score.masked_fill(~band.seen(cluster_TJ, some)[:, :, :, None], NONE)
    y_NJXd = score.softmax(-1).flatten(2, 3) @ v_NJSd
    y_XHd = y_NJXd.view(N, J, Q, G * d).transpose(1, 2).reshape(-1, H, d)
    return y_XHd, score.logsumexp(-1).transpose(1, 2).reshape(-1, H)
