"""Routers of pruning taught by trials: what did it cost that just these tokens left?

A loss's own gradient reaches tokens that stayed, and says which of them should count more; of those
that left it says nothing, so it cannot teach who may go. Here tokens leave by chance, the more
likely the less the router thinks of them; the model runs twice, and the two losses of a text differ
by what the one draw has lost and the other has not. Routers are regressed on that difference: the
sum of their logits of those that left is to be the loss. No gradient passes through the model,
which may be frozen, and any loss will do, smooth or not.

Not covered: pruning by threshold, and by attention received, which has no logit.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from moe_router.errors import ConfigError
from moe_router.layers.prune import Prune

LEAST = 1e-12  # of a difference of losses, where there is none


def trial_loss(model: nn.Module, losses: Callable[[], Tensor]) -> Tensor:
    """What the routers of `model` miss of the difference between two draws, by its square.

    Args:
        model: with layers that prune, in evaluation mode: dropout would be taken for worth.
        losses: runs the model once, without gradients, and says (B,) the loss of each sequence.

    Returns:
        A scalar: 1 is what routers that know nothing have. Its gradient reaches routers alone.

    Raises:
        ConfigError: nothing prunes, or nothing of it can be taught so; losses of another shape.
    """
    prunes = [module for module in model.modules() if isinstance(module, Prune)]
    if not prunes:
        raise ConfigError("trial_loss: the model prunes nothing; want kind=prune")
    for prune in prunes:
        config = prune.config
        if config.decide != "top" or config.router == "attention":
            raise ConfigError(
                f"trial_loss: decide={config.decide}, router={config.router}: want decide=top and "
                "a router with logits: linear, mlp or position"
            )
    (first_B, said_B), (other_B, other_said_B) = (_draw(prunes, losses) for _ in range(2))
    worth_B = first_B - other_B
    scale = worth_B.square().mean().sqrt().clamp(min=LEAST)  # logits have no unit
    return (said_B - other_said_B - worth_B / scale).square().mean()


def _draw(prunes: list[Prune], losses: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """(B,) the losses without some tokens, and (B,) what routers say of those."""
    try:
        for prune in prunes:
            prune.tries = True
        with torch.no_grad():
            loss_B = losses()
        said_B = torch.stack([prune.left_B for prune in prunes if prune.left_B is not None]).sum(0)
    finally:
        for prune in prunes:
            prune.tries, prune.left_B = False, None
    if loss_B.shape != said_B.shape:
        raise ConfigError(
            f"trial_loss: losses of shape {tuple(loss_B.shape)}: want {tuple(said_B.shape)}, one "
            "for each sequence"
        )
    return loss_B.to(said_B.dtype), said_B
