"""What a pass is expected to cost by what its routers say, and how strongly training holds that
down: until what is executed is a given share of the dense model's FLOPs."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moe_router.config import RoutingConfig
from moe_router.routing.depth import Kept
from moe_router.types import Choice

DAMPING = 20.0  # steps of the sum that what is missed now counts as


class ExpectedCost:
    """C = sum_i sum_j p_ij c_j of one pass: p_ij is the probability by which token i takes block
    j, c_j the FLOPs of the block for one token, in which null experts cost nothing.

    Args:
        flops: of each block: without the experts that are chosen, and of those.
        tokens: that came in.
    """

    def __init__(self, flops: Sequence[tuple[float, float]], tokens: int) -> None:
        total = max(1.0, sum(fixed + chosen for fixed, chosen in flops))  # 0: all is padding
        self._shares = [(fixed / total, chosen / total) for fixed, chosen in flops]
        self._going: Tensor | float = float(tokens)
        self._spent: Tensor | float = 0.0

    def block(self, layer: int, kept: Kept | None, choice: Choice | None = None) -> None:
        """Count a block.

        Args:
            kept: which tokens it computed, if a router chose them for it alone.
            choice: of its experts.
        """
        alone = kept is not None and kept.expected is not None
        taking = kept.expected if alone and kept is not None else self._going
        assert taking is not None
        fixed, chosen = self._shares[layer]
        real = 1.0 if choice is None or choice.real is None else choice.real
        self._spent = self._spent + (fixed + chosen * real) * taking

    def leave(self, kept: Kept | None) -> None:
        """Tokens left for good, if some did."""
        if kept is not None and kept.expected is not None:
            self._going = kept.expected

    def loss(self, tokens: Tensor) -> Tensor:
        """As a share of the dense model's; tokens: over all ranks."""
        return self._spent / tokens.clamp(min=1)


class Budget(nn.Module):
    """The coefficient of the expected cost. With a budget it rises while too much is executed and
    falls while too little is, below 0 if it must: a sum of what was missed so far, gradient ascent
    on the multiplier of the constraint, and a part for what is missed now, which damps it.

    Args:
        config: budget, budget_rate, cost_loss.
    """

    sum: Tensor
    now: Tensor

    def __init__(self, config: RoutingConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("sum", torch.full((1,), config.cost_loss))
        self.register_buffer("now", torch.zeros(1))

    @property
    def weight(self) -> Tensor:
        """A scalar on the device."""
        return (self.sum + self.now).squeeze()

    @torch.no_grad()
    def update(self, executed: float, expected: float, step: int) -> None:
        """After a step, with numbers that are equal on all ranks.

        Args:
            executed: FLOPs, as a share of the dense model's.
            expected: by the routers; what counts while a soft threshold lets nobody go.
            step: steps before this one.
        """
        config = self.config
        if config.budget is None:
            return
        spent = expected if step < config.soft_steps else executed
        over = spent - config.eased(config.budget, step)
        self.sum.add_(config.budget_rate * over)
        self.now.fill_(DAMPING * config.budget_rate * over)
