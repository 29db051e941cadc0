"""From scores to the ids and weights of each token's choices."""

import math
from fractions import Fraction

import torch
from torch import Tensor

from moe_router.config import RouterConfig
from moe_router_kernels import reference


def capacity(tokens: int, config: RouterConfig, default: float = 1.0) -> int:
    """Most rows one expert takes of `tokens` tokens: a multiple of the mean load, rounded up."""
    factor = default if config.capacity_factor is None else config.capacity_factor
    # 1.1 means 11/10: in floats, 1.1 times a mean load of 10 is rounded up to 12
    exact = Fraction(str(factor)) * tokens * config.top_k / config.experts
    return min(tokens, math.ceil(exact))


@torch.no_grad()
def decide(score_TG: Tensor, bias_E: Tensor | None, config: RouterConfig) -> Tensor:
    """The groups each token goes to, best first.

    Args:
        score_TG: (T, E + Z) fp32, Z null experts last.
        bias_E: (E,) fp32, added for the choice alone, never for the weight; or None.

    Returns:
        (T, K) int32, ids >= E are null experts; for expert choice (T, E), -1 is not chosen.
    """
    E = config.experts
    if config.policy == "expert_choice":
        return reference.expert_choice(score_TG, capacity(score_TG.size(0), config))
    ranked_TG = score_TG
    if bias_E is not None:
        ranked_TG = torch.cat([score_TG[:, :E] + bias_E, score_TG[:, E:]], 1)
    if config.expert_groups > 1:
        real_TE = reference.limit_groups(ranked_TG[:, :E], config.expert_groups, config.top_groups)
        ranked_TG = torch.cat([real_TE, ranked_TG[:, E:]], 1)
    return reference.top_k(ranked_TG, config.top_k)


def weigh(score_TG: Tensor, target_TK: Tensor, config: RouterConfig) -> Tensor:
    """(T, K) fp32 weights of the real choices; differentiable in the scores."""
    weight_TK = reference.choice_weights(score_TG, target_TK, config.renormalise)
    if config.straight_through:
        chosen_TK = (target_TK >= 0).float()
        hard_TK = chosen_TK / chosen_TK.sum(-1, keepdim=True).clamp(min=1)
        weight_TK = weight_TK + (hard_TK - weight_TK).detach()
    return weight_TK * config.scale
