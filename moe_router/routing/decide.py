"""What a config says of capacity and weights."""

from fractions import Fraction

from torch import Tensor

from moe_router.config import RouterConfig
from moe_router_kernels.choose import constant_while_tracing


def capacity(tokens: int, config: RouterConfig, default: float = 1.0) -> int:
    """Most rows one expert takes of `tokens` tokens: a multiple of the mean load, rounded up."""
    factor = default if config.capacity_factor is None else config.capacity_factor
    above, below = _ratio(factor)
    mean: int = -(-above * tokens * config.top_k // (below * config.experts))
    return min(tokens, mean)


@constant_while_tracing
def _ratio(factor: float) -> tuple[int, int]:
    """1.1 means 11/10: in floats, 1.1 times a mean load of 10 is rounded up to 12."""
    return Fraction(str(factor)).as_integer_ratio()


def weigh(weight_TK: Tensor, target_TK: Tensor, config: RouterConfig) -> Tensor:
    """(T, K) fp32 weights as they multiply the outputs, from the scores of the choices."""
    if config.straight_through:
        chosen_TK = (target_TK >= 0).float()
        hard_TK = chosen_TK / chosen_TK.sum(-1, keepdim=True).clamp(min=1)
        weight_TK = weight_TK + (hard_TK - weight_TK).detach()
    return weight_TK if config.scale == 1 else weight_TK * config.scale
