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
    branch: int = 0  # blocks are found in a tree with so many under a node; 0: each is scored
    gated: bool = False  # what comes from a block is weighed by p, through which the choice learns
    dense_last: int = 0  # last layers that attend to everything
    curriculum: int = 0  # training steps over which top_k comes down from all blocks

    def __post_init__(self) -> None:
        for key, holds, want in (
            ("block", self.block >= 1, "at least 1 token"),
            ("top_k", self.top_k >= 1, "at least 1 block"),
            ("window", self.window >= 0, "0 or more tokens"),
            ("branch", self.branch == 0 or self.branch >= 2, "2 or more, or 0 for none"),
            ("dense_last", self.dense_last >= 0, "0 or more layers"),
            ("curriculum", self.curriculum >= 0, "0 or more steps"),
        ):
            require(holds, f"model.attention.{key}", getattr(self, key), want)
        if self.branch:
            want = "keys, or model.attention.branch=0: a tree is of mean keys"
            require(self.router == "keys", "model.attention.router", self.router, want)

    @property
    def near(self) -> int:
        """Blocks on one side that are always seen."""
        return -(-self.window // self.block)

    def least(self, causal: bool) -> int:
        """Blocks that are always chosen."""
        return 1 + self.near * (1 if causal else 2)

    def levels(self, blocks: int) -> int:
        """Of a tree over so many blocks, the blocks themselves included."""
        count = 1
        while self.branch**count < blocks:
            count += 1
        return count

    def choosing(self, queries: int, keys: int, kv_width: int, longest: int) -> int:
        """FLOPs of the scores by which so many query blocks choose among so many key blocks.

        Args:
            longest: blocks of the longest sequence.
        """
        scored = keys if self.router == "keys" else 0
        if self.branch:
            kept = self.top_k - self.near - 1
            scored = self.levels(longest) * (kept + 1) * self.branch
        return 2 * queries * scored * kv_width

    def eased(self, blocks: int, step: int | None) -> int:
        """Blocks to choose of a sequence of so many after `step` steps of training; None: it is
        over."""
        if step is None or step >= self.curriculum or blocks <= self.top_k:
            return self.top_k
        return math.ceil(blocks - (blocks - self.top_k) * step / self.curriculum)
