"""The schema of routed attention: what `model.attention` holds in a run's config."""

import math
from dataclasses import dataclass
from typing import Literal

from moe_router.errors import require

FEATURES = 64  # of a router of clusters by position


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionConfig:
    """Which tokens a token attends to. Equations: docs/routing.md."""

    kind: Literal["routed"]
    select: Literal["blocks", "clusters"] = "blocks"  # of keys for a block of queries; of tokens
    block: int = 64  # tokens of a block
    top_k: int = 16  # key blocks that a query block attends to, its own and the window's included
    window: int = 512  # tokens before a query block (a query) that it always sees (blocks: whole)
    router: Literal["keys", "linear", "position", "random"] = "keys"  # the last two are controls
    clusters: int = 8  # C: a token attends to those of its own
    global_tokens: int = 0  # first tokens of a sequence, which all see, whatever their clusters
    temperature: float = 1.0  # of the softmax over clusters
    noise: float = 1.0  # factor on the Gumbel noise by which training explores clusters
    balance_loss: float = 0.01  # coefficient of the balance loss of clusters in each sequence
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
            ("clusters", self.clusters >= 1, "at least 1"),
            ("global_tokens", self.global_tokens >= 0, "0 or more tokens"),
            ("temperature", self.temperature > 0, "above 0"),
            ("noise", self.noise >= 0, "0 or more"),
            ("balance_loss", self.balance_loss >= 0, "0 or more"),
        ):
            require(holds, f"model.attention.{key}", getattr(self, key), want)
        if self.clustered:
            want = "linear, position or random: a token's state says which cluster is its own"
            require(self.router != "keys", "model.attention.router", self.router, want)
            want = "0, or model.attention.select=blocks: clusters have no tree"
            require(self.branch == 0, "model.attention.branch", self.branch, want)
            return
        want = "keys, position or random, or model.attention.select=clusters"
        require(self.router != "linear", "model.attention.router", self.router, want)
        if self.branch:
            want = "keys, or model.attention.branch=0: a tree is of mean keys"
            require(self.router == "keys", "model.attention.router", self.router, want)

    @property
    def clustered(self) -> bool:
        """Whether tokens choose clusters, not blocks of queries blocks of keys."""
        return self.select == "clusters"

    @property
    def cluster_score(self) -> Literal["linear", "position"] | None:
        """What scores clusters; None: noise alone."""
        return self.router if self.router in ("linear", "position") else None

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

    def open_clusters(self, step: int | None) -> int:
        """Clusters to choose among after `step` steps of training; None: it is over. One is dense
        attention."""
        if step is None or step >= self.curriculum:
            return self.clusters
        return max(1, self.clusters * step // self.curriculum)
