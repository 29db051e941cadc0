"""The schema of routed attention: what `model.attention` holds in a run's config."""

import math
from dataclasses import dataclass
from typing import Literal

from moe_router.errors import require


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionConfig:
    """Which tokens a token attends to. Equations: docs/routing.md."""

    kind: Literal["routed"]
    block: int = 64  # tokens of a block
    top_k: int = 16  # key blocks that a query block attends to, its own and the window's included
    window: int = 512  # tokens before a query block that it always sees, in whole blocks
    router: Literal["keys", "position", "random"] = "keys"  # the others are controls
    gated: bool = False  # what comes from a block is weighed by p, through which the choice learns
    dense_last: int = 0  # last layers that attend to everything
    curriculum: int = 0  # training steps over which top_k comes down from all blocks

    def __post_init__(self) -> None:
        for key, holds, want in (
            ("block", self.block >= 1, "at least 1 token"),
            ("top_k", self.top_k >= 1, "at least 1 block"),
            ("window", self.window >= 0, "0 or more tokens"),
            ("dense_last", self.dense_last >= 0, "0 or more layers"),
            ("curriculum", self.curriculum >= 0, "0 or more steps"),
        ):
            require(holds, f"model.attention.{key}", getattr(self, key), want)

    @property
    def near(self) -> int:
        """Blocks on one side that are always seen."""
        return -(-self.window // self.block)

    def least(self, causal: bool) -> int:
        """Blocks that are always chosen."""
        return 1 + self.near * (1 if causal else 2)

    def eased(self, blocks: int, step: int | None) -> int:
        """Blocks to choose of a sequence of so many after `step` steps of training; None: it is
        over."""
        if step is None or step >= self.curriculum or blocks <= self.top_k:
            return self.top_k
        return math.ceil(blocks - (blocks - self.top_k) * step / self.curriculum)
