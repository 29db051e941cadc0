"""The losses of a router, named and unscaled: this rank's share of a sum over all ranks."""

import torch
from torch import Tensor

from moe_router.config import RouterConfig
from moe_router.routing.context import Context
from moe_router.types import Tokens, Total
from moe_router_kernels import reference


def router_losses(
    logits_TG: Tensor,
    score_TG: Tensor,
    target_TK: Tensor,
    chosen_G: Tensor | None,
    tokens: Tokens,
    config: RouterConfig,
    context: Context,
    total: Total,
) -> dict[str, Tensor]:
    """Losses whose coefficient is not 0.

    Args:
        logits_TG, score_TG: (T, E + Z) fp32.
        target_TK: (T, K) int32, raw choices, null experts included if a loss is by sequence.
        chosen_G: (E + Z,) int64, choices of each group if they are known already.
        total: sums a tensor over all ranks; called once.
    """
    if not (config.balance_loss or config.z_loss or config.sequence_balance_loss):
        return {}
    G = score_TG.size(1)

    def over_all_ranks() -> Tensor:
        load_G = chosen_G if chosen_G is not None else reference.count(target_TK, G)
        # new_full, not tensor([...]): a fill does not wait for the device
        T, B = (load_G.new_full((1,), n) for n in (len(target_TK), len(tokens.offsets_B1) - 1))
        return total(torch.cat([load_G, T, B]))

    counts = context.recall("counts", over_all_ranks)
    load_G, token_count, sequence_count = counts[:G], counts[G], counts[G + 1]
    probability_TG = score_TG / score_TG.sum(-1, keepdim=True).clamp(min=1e-20)
    losses = {}
    if config.balance_loss:
        load_G = _share_nulls(load_G.float(), config.experts)
        losses["balance"] = reference.balance_loss(probability_TG, load_G, token_count)
    if config.z_loss:
        losses["z"] = reference.z_loss(logits_TG, token_count)
    if config.sequence_balance_loss:
        losses["sequence_balance"] = reference.sequence_balance_loss(
            probability_TG, target_TK, tokens.offsets_B1, sequence_count
        )
    return losses


def _share_nulls(load_G: Tensor, experts: int) -> Tensor:
    """Null experts are alike: each counts as their mean, so none is pushed to equal another.

    Source: AdaMoE, Zeng et al. 2024, arXiv:2406.13233.
    """
    nulls = load_G[experts:]
    if nulls.numel() == 0:
        return load_G
    return torch.cat([load_G[:experts], nulls.mean().expand_as(nulls)])
