"""The losses of a router, named and unscaled: this rank's share of a sum over all ranks."""

import torch
from torch import Tensor

from moe_router.config import RouterConfig
from moe_router.routing.context import Context
from moe_router.types import Tokens, Total
from moe_router_kernels import Gate, reference


def wants_sums(config: RouterConfig) -> bool:
    """Whether a loss, or what null experts are expected to save, needs the sums of the gate."""
    return bool(config.balance_loss or config.z_loss or config.null_experts)


def router_losses(
    logits_TG: Tensor,
    made: Gate,
    chosen_G: Tensor | None,
    tokens: Tokens,
    config: RouterConfig,
    context: Context,
    total: Total,
) -> dict[str, Tensor]:
    """Losses whose coefficient is not 0.

    Args:
        logits_TG: (T, E + Z) fp32.
        made: of the gate, with sums if `wants_sums`.
        chosen_G: (E + Z,) choices of each group if they are known already.
        total: sums a tensor over all ranks; called once.
    """
    if not (config.balance_loss or config.z_loss or config.sequence_balance_loss):
        return {}
    T, G = logits_TG.shape

    def over_all_ranks() -> Tensor:
        load_G = reference.count(made.raw_TK, G) if chosen_G is None else chosen_G.long()
        # new_full, not tensor([...]): a fill does not wait for the device
        counts = (load_G.new_full((1,), n) for n in (T, len(tokens.offsets_B1) - 1))
        return total(torch.cat([load_G, *counts]))

    counts = context.recall("counts", over_all_ranks)
    load_G, token_count, sequence_count = counts[:G], counts[G], counts[G + 1]
    losses = {}
    if config.balance_loss:
        load_G = _share_nulls(load_G.float(), config.experts)
        losses["balance"] = reference.balance_loss(made.share_G, load_G, token_count)
    if config.z_loss:
        losses["z"] = reference.z_loss(made.z, token_count)
    if config.sequence_balance_loss:
        share_TG = reference.share(reference.score(logits_TG, config.score))
        losses["sequence_balance"] = reference.sequence_balance_loss(
            share_TG, made.raw_TK, tokens.offsets_B1, sequence_count
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
