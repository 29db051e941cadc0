"""The specification of routing, in plain torch, short enough to read in one sitting.

T tokens, G groups (experts), K choices per token, R = T * K routed rows, D hidden, F expert hidden.
Ids are int32 and -1 means none. Ties go to the lower id; all sorts are stable.
"""

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

MASK32 = 0xFFFFFFFF


# --- score and decide ------------------------------------------------------------------------


def wide(x: Tensor) -> Tensor:
    """fp32, the least precision of routing; fp64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def score(logits_TG: Tensor, kind: str) -> Tensor:
    """fp32 scores: `softmax` over the groups, or `sigmoid` of each."""
    logits_TG = wide(logits_TG)
    return logits_TG.softmax(-1) if kind == "softmax" else logits_TG.sigmoid()


def limit_groups(score_TE: Tensor, expert_groups: int, top_groups: int) -> Tensor:
    """Keep the scores of each token's best groups of neighbouring experts; the others get -inf.

    A group is worth the sum of its two best scores (DeepSeek-V3, arXiv:2412.19437, section 2.1.2).
    """
    T, E = score_TE.shape
    grouped = score_TE.view(T, expert_groups, E // expert_groups)
    best_two = grouped.topk(min(2, grouped.size(-1)), -1).values.sum(-1)
    chosen = best_two.argsort(dim=-1, descending=True, stable=True)[:, :top_groups]
    keep = torch.zeros_like(best_two, dtype=torch.bool).scatter_(1, chosen, True)
    return grouped.masked_fill(~keep[..., None], float("-inf")).view(T, E)


def top_k(ranked_TG: Tensor, k: int) -> Tensor:
    """(T, K) int32: the ids of the k highest numbers, best first. NaN is lower than any number."""
    return (-ranked_TG).argsort(dim=-1, stable=True)[:, :k].int()


def decide(
    logits_TG: Tensor,
    k: int,
    experts: int,
    kind: str,
    bias_E: Tensor | None = None,
    expert_groups: int = 1,
    top_groups: int = 1,
) -> Tensor:
    """(T, K) int32: the best groups of each token, best first; ids >= experts are null experts.

    Ranked by score where a bias or a limit asks for scores, else by logit: the same order, but
    without the ties that rounding makes and without a power of e, which differs between devices.

    Args:
        bias_E: added to the score for the choice alone, never for the weight.
        expert_groups, top_groups: of `limit_groups`.
    """
    if bias_E is None and expert_groups == 1:
        return top_k(wide(logits_TG), k)
    score_TG = score(logits_TG, kind)
    score_TG = score_TG.masked_fill(score_TG.isnan(), -1e30)  # above what `limit_groups` excludes
    real_TE, null_TZ = score_TG[:, :experts], score_TG[:, experts:]
    if bias_E is not None:
        real_TE = real_TE + bias_E
    if expert_groups > 1:
        real_TE = limit_groups(real_TE, expert_groups, top_groups)
    return top_k(torch.cat([real_TE, null_TZ], 1), k)


def select_top_c(score_TG: Tensor, offsets_S1: Tensor, count_S: Tensor) -> Tensor:
    """(T, G) bool: whether a token is among the best of its segment for the group.

    Each group takes the count_S[s] highest scores of segment s; NaN is lower than any score, ties
    go to the earlier token, and nobody takes one behind the last segment. Expert choice (Zhou et
    al. 2022, arXiv:2202.09368) has a segment for each source rank, Mixture-of-Depths (Raposo et al.
    2024, arXiv:2404.02258, section 3.4) one for each sequence, and one group.
    """
    T, G = score_TG.shape
    ranked_TG = score_TG.masked_fill(score_TG.isnan(), -1e30)
    order_TG = ranked_TG.argsort(dim=0, descending=True, stable=True)
    segment_T = sequence_of(offsets_S1, T)
    order_TG = order_TG.gather(0, segment_T[order_TG].argsort(dim=0, stable=True))
    # sorted by segment, so place t of any column belongs to the segment of token t
    rank_T = torch.arange(T, device=segment_T.device) - offsets_S1.long()[segment_T]
    taken_T1 = (rank_T < F.pad(count_S, (0, 1))[segment_T])[:, None]
    return torch.zeros_like(order_TG, dtype=torch.bool).scatter_(0, order_TG, taken_T1.expand(T, G))


def rms_logit(x_TD: Tensor, weight_1D: Tensor, bias: Tensor) -> Tensor:
    """(T,): w x / rms(x) + b, in fp32 at least; x of any scale."""
    normed_TD = F.rms_norm(wide(x_TD), (x_TD.size(-1),))
    weight_1D, bias = weight_1D.to(normed_TD.dtype), bias.to(normed_TD.dtype)
    return F.linear(normed_TD, weight_1D).squeeze(-1) + bias


def linear_of_kept(x_TK: Tensor, weight_NK: Tensor, kept_T: Tensor) -> Tensor:
    """(T, N): a linear layer where `kept_T`, 0 elsewhere, whatever stands there in x."""
    x_TK = x_TK.masked_fill(~kept_T[:, None], 0)
    return F.linear(x_TK, weight_NK)


def linears(x_TK: Tensor, weights: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Linear layers of the same tokens, computed and returned in `dtype`."""
    return [F.linear(x_TK.to(dtype), w_NK.to(dtype)) for w_NK in weights]


def choice_weights(score_TG: Tensor, target_TK: Tensor, renormalise: bool) -> Tensor:
    """(T, K) fp32: the score of each choice, 0 for none; renormalised weights sum to 1."""
    weight_TK = score_TG.gather(1, target_TK.clamp(min=0).long())
    weight_TK = weight_TK.masked_fill(target_TK < 0, 0.0)
    if renormalise:
        weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True).clamp(min=1e-20)
    return weight_TK


def share(score_TG: Tensor) -> Tensor:
    """(T, G): scores over their sum, which sigmoids lack."""
    return score_TG / score_TG.sum(-1, keepdim=True).clamp(min=1e-20)


def loss_sums(logits_TG: Tensor, score_TG: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over the tokens for `balance_loss`, (G,), and for `z_loss`, (1,)."""
    z_T = wide(logits_TG).logsumexp(-1).square()
    return share(score_TG).sum(0), z_T.sum()[None]


def gate_backward(
    grad_TK: Tensor,
    grad_G: Tensor | None,
    grad_z: Tensor | None,
    logits_TG: Tensor,
    target_TK: Tensor,
    kind: str,
    renormalise: bool,
) -> Tensor:
    """(T, G) gradient of the logits from those of `choice_weights` and of `loss_sums`.

    Args:
        target_TK: -1 where there is no weight.
    """
    logits_TG = wide(logits_TG)
    score_TG = score(logits_TG, kind)
    at_TK, none_TK = target_TK.clamp(min=0).long(), target_TK < 0
    grad_TK = grad_TK.masked_fill(none_TK, 0.0)
    if renormalise:
        chosen_TK = score_TG.gather(1, at_TK).masked_fill(none_TK, 0.0)
        total_T1 = chosen_TK.sum(-1, keepdim=True)
        mean_T1 = (grad_TK * chosen_TK).sum(-1, keepdim=True) / total_T1.clamp(min=1e-20)
        mean_T1 = torch.where(total_T1 > 1e-20, mean_T1, 0.0)
        grad_TK = ((grad_TK - mean_T1) / total_T1.clamp(min=1e-20)).masked_fill(none_TK, 0.0)
    grad_TG = torch.zeros_like(score_TG).scatter_add_(1, at_TK, grad_TK)
    if grad_G is not None:
        total_T1 = score_TG.sum(-1, keepdim=True).clamp(min=1e-20)
        mean_T1 = (grad_G * score_TG).sum(-1, keepdim=True) / total_T1
        grad_TG = grad_TG + (grad_G - mean_T1) / total_T1
    if kind == "softmax":
        grad_TG = score_TG * (grad_TG - (score_TG * grad_TG).sum(-1, keepdim=True))
    else:
        grad_TG = score_TG * (1 - score_TG) * grad_TG
    if grad_z is not None:
        grad_TG = grad_TG + 2 * grad_z * logits_TG.logsumexp(-1, True) * logits_TG.softmax(-1)
    return grad_TG


# --- plan ------------------------------------------------------------------------------------


def plan(target_TK: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sort the choices by group, token order inside a group.

    Returns:
        src_R, choice_R, offsets_G1, row_TK as in `moe_router.types.Plan`, all int32; R = T * K.
    """
    K = target_TK.size(1)
    flat = target_TK.flatten()
    key, order = torch.where(flat < 0, groups, flat).sort(stable=True)
    bounds = torch.arange(groups + 1, device=flat.device, dtype=key.dtype)
    offsets_G1 = torch.searchsorted(key, bounds, out_int32=True)
    rows = torch.arange(flat.numel(), device=flat.device, dtype=torch.int32)
    live = key < groups
    choice_R = torch.where(live, order.int(), -1)
    src_R = torch.where(live, order.int() // max(K, 1), -1)
    row_TK = torch.empty_like(rows).scatter_(0, order, torch.where(live, rows, -1))
    return src_R, choice_R, offsets_G1, row_TK.view(target_TK.shape)


def rank_in_group(target_TK: Tensor, groups: int, order: Tensor) -> Tensor:
    """(T, K) int32: how many choices stand before each one in its group, in the order given.

    Args:
        order: permutation of the T * K flat choices, first served first.
    """
    key = torch.where(target_TK < 0, groups, target_TK).flatten()[order]
    key, by_key = key.sort(stable=True)
    first = torch.searchsorted(key, key)  # where the choice's own group begins
    rank = torch.arange(key.numel(), device=key.device) - first
    return torch.empty_like(rank).scatter_(0, order[by_key], rank).int().view(target_TK.shape)


def serve_by_position(position_T: Tensor, K: int) -> Tensor:
    """Flat choices in time: all tokens of position 0 first, then of position 1, and so on."""
    token = position_T.argsort(stable=True)
    return (token[:, None] * K + torch.arange(K, device=token.device)).flatten()


def serve_by_score(weight_TK: Tensor) -> Tensor:
    """Flat choices, the heaviest first."""
    return weight_TK.flatten().argsort(descending=True, stable=True)


def sequence_of(offsets_B1: Tensor, T: int) -> Tensor:
    """(T,) the sequence of each packed token."""
    token_T = torch.arange(T, device=offsets_B1.device, dtype=offsets_B1.dtype)
    return torch.searchsorted(offsets_B1[1:].contiguous(), token_T, right=True)


# --- move rows -------------------------------------------------------------------------------


def gather(x_TD: Tensor, src_R: Tensor) -> Tensor:
    """(R, D): the token of each row. Rows past the end are unspecified."""
    return x_TD[src_R.clamp(min=0)]


def gather_backward(grad_RD: Tensor, row_TK: Tensor) -> Tensor:
    """(T, D): each token sums its rows over k, in fp32, in order of k."""
    unit = torch.ones(row_TK.shape, device=row_TK.device)
    return combine(grad_RD, unit, row_TK)


def combine(y_RD: Tensor, weight_TK: Tensor, row_TK: Tensor) -> Tensor:
    """(T, D): sum over k of weight * row, in fp32 (fp64 stays), in order of k."""
    out_TD = wide(y_RD.new_zeros(row_TK.size(0), y_RD.size(1)))
    if y_RD.size(0) == 0 and row_TK.size(0) > 0:  # every choice was dropped
        return out_TD.to(y_RD.dtype)
    for k in range(row_TK.size(1)):
        row_T = row_TK[:, k]
        term_TD = wide(y_RD[row_T.clamp(min=0)]) * weight_TK[:, k, None]
        # where, not a product with 0: unspecified rows may hold NaN
        out_TD = out_TD + torch.where((row_T < 0)[:, None], 0.0, term_TD)
    return out_TD.to(y_RD.dtype)


def combine_backward(
    grad_TD: Tensor,
    y_RD: Tensor,
    weight_TK: Tensor,
    src_R: Tensor,
    choice_R: Tensor,
    row_TK: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of `combine`: (R, D) for the rows, 0 past the end, and (T, K) for the weights."""
    if y_RD.size(0) == 0:  # every choice was dropped
        return torch.zeros_like(y_RD), torch.zeros_like(weight_TK)
    live_R1 = (src_R >= 0)[:, None]
    grad_RD = wide(grad_TD[src_R.clamp(min=0)])
    dot_R = (grad_RD * wide(y_RD)).sum(-1)
    grad_TK = torch.where(row_TK < 0, 0.0, dot_R[row_TK.clamp(min=0)]).to(weight_TK.dtype)
    weight_R1 = weight_TK.flatten()[choice_R.clamp(min=0)][:, None]
    return torch.where(live_R1, grad_RD * weight_R1, 0.0).to(y_RD.dtype), grad_TK


# --- compute ---------------------------------------------------------------------------------


def grouped_mm(x_RD: Tensor, w_GDF: Tensor, offsets_G1: Tensor) -> Tensor:
    """(R, F): rows of group g times w[g]. Rows past offsets_G1[G] are unspecified (here 0)."""
    if w_GDF.size(0) == 0:  # zeros that w has a part in: every rank must have a backward
        return x_RD @ w_GDF.sum(0)
    bounds = offsets_G1.tolist()
    parts = [x_RD[a:b] @ w for a, b, w in zip(bounds, bounds[1:], w_GDF, strict=False)]
    rest = x_RD.new_zeros(x_RD.size(0) - bounds[-1], w_GDF.size(2))
    return torch.cat([*parts, rest])


def group_weights(x_RD: Tensor, y_RF: Tensor, offsets_G1: Tensor) -> Tensor:
    """(G, D, F): x transposed times y over the rows of each group, the gradient of its matrix."""
    bounds = offsets_G1.tolist()
    parts = [x_RD[a:b].T @ y_RF[a:b] for a, b in itertools.pairwise(bounds)]
    return torch.stack(parts) if parts else x_RD.new_zeros(0, x_RD.size(1), y_RF.size(1))


# --- losses: each is this rank's share of a sum over all ranks -------------------------------


def count(target_TK: Tensor, groups: int) -> Tensor:
    """(G,) int64: choices of each group; -1 counts nowhere."""
    flat = target_TK.flatten()
    key = torch.where(flat < 0, groups, flat).long()
    zeros = torch.zeros(groups + 1, dtype=torch.int64, device=flat.device)
    return zeros.scatter_add_(0, key, torch.ones_like(key))[:groups]


def balance_loss(share_G: Tensor, load_G: Tensor, tokens: Tensor) -> Tensor:
    """Switch loss: G * sum_g (share of choices of g) * (mean probability of g); 1 when uniform.

    Args:
        share_G: fp32, sum of the probabilities of this rank's tokens.
        load_G, tokens: choices of each group and tokens, over all ranks.

    Source: Fedus et al. 2021, arXiv:2101.03961, equation 4, with the share over all K choices.
    """
    chosen_G = load_G / load_G.sum().clamp(min=1)
    return load_G.numel() * (chosen_G * share_G).sum() / tokens.clamp(min=1)


def z_loss(z: Tensor, tokens: Tensor) -> Tensor:
    """Mean squared log-sum-exp, from its sum over this rank's tokens.

    Source: Zoph et al. 2022, arXiv:2202.08906, equation 5.
    """
    return z.squeeze() / tokens.clamp(min=1)


def sequence_balance_loss(
    probability_TG: Tensor, target_TK: Tensor, offsets_B1: Tensor, sequences: Tensor
) -> Tensor:
    """The balance loss inside each sequence, mean over the sequences of all ranks.

    Source: DeepSeek-V3, arXiv:2412.19437, equations 17 to 20.
    """
    T, G = probability_TG.shape
    B = offsets_B1.numel() - 1
    sequence_T = sequence_of(offsets_B1, T)
    # one-hot products, not index_add: a fixed order of summation on every device
    member_BT = sequence_T == torch.arange(B, device=sequence_T.device)[:, None]
    member_BT = member_BT.to(probability_TG.dtype)
    ids_G = torch.arange(G, device=sequence_T.device)
    chosen_TG = (target_TK[..., None] == ids_G).sum(1).to(probability_TG.dtype)
    share_BG = member_BT @ chosen_TG
    share_BG = share_BG / share_BG.sum(-1, keepdim=True).clamp(min=1)
    mean_BG = (member_BT @ probability_TG) / member_BT.sum(-1, keepdim=True).clamp(min=1)
    return G * (share_BG * mean_BG).sum() / sequences.clamp(min=1)


# --- noise -----------------------------------------------------------------------------------


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit integers with good avalanche, held in int64.

    Source of the constants: C. Wellons, "Prospecting for hash functions" (lowbias32).
    """
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & MASK32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & MASK32
    return x ^ (x >> 16)


def uniform_noise(
    seed: int, step: int, layer: int, first_token: int, T: int, C: int, device: torch.device
) -> Tensor:
    """(T, C) fp32 in [0, 1): a pure function of (seed, step, layer, global token index, column)."""
    state = torch.full((), seed & MASK32, device=device, dtype=torch.int64)
    token_T1 = torch.arange(first_token, first_token + T, device=device)[:, None] & MASK32
    column_C = torch.arange(C, device=device)
    for part in (step & MASK32, layer & MASK32, token_T1, column_C):
        state = _mix(_mix(state) ^ part)
    return (state >> 8).float() * 2.0**-24
