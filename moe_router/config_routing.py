"""The schema of routing in depth: what `model.routing` holds in a run's config."""

from dataclasses import dataclass
from typing import Literal

from moe_router.errors import require

DepthRouterKind = Literal["linear", "mlp", "position", "attention"]  # attention: what is received


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutingConfig:
    """Which blocks a token takes. Equations: docs/routing.md."""

    kind: Literal["skip", "halt", "leap", "prune", "merge"]
    decide_at: Literal["same", "previous", "early"] = "same"  # skip, leap: by the state before
    # the block, before the block before it, or before the first: all blocks are decided at once
    halting: Literal["act", "ponder", "tsa"] = "act"  # halt: what a token's probabilities do
    decide: Literal["top", "threshold"] = "top"  # prune: the best of a sequence, or those above
    keep: float = 0.5  # skip: of a sequence, what a routed block computes; prune: what it leaves
    threshold: float | None = None  # halt: of the sum (null: 0.99); prune, leap: least (null: 0.5)
    temperature: float = 0.1  # prune: width of the soft threshold that gradients see
    soft_steps: int = 0  # prune, halt, leap: first training steps in which everybody is computed
    protect: int = 1  # prune, leap: first tokens of a sequence that always stay
    min_keep: int = 1  # prune: tokens of a sequence that stay at least
    every: int = 2  # every n-th block is routed
    first: int = 1  # blocks before this one are not
    router: DepthRouterKind = "linear"
    router_hidden: int = 64  # width of the mlp router and predictor, features of the position
    predictor: Literal["score", "mlp"] = "score"  # skip: who decides where later tokens are unknown
    predictor_loss: float = 0.01  # coefficient of what teaches it
    start: float = -3.0  # halt, leap: logit of its probability before any training
    ponder_loss: float = 0.01  # halt: of steps plus remainder (act), of the divergence (ponder)
    prior: float = 0.2  # halt by ponder: to halt at a step, by the geometric prior
    cost_loss: float = 0.0  # coefficient of the expected FLOPs, as a share of the dense model's
    budget: float | None = None  # share of those FLOPs to execute: training sets the coefficient
    budget_rate: float = 0.05  # by how much it changes in a step, over how far that is missed
    curriculum: int = 0  # training steps over which keep and budget come down from 1
    frozen: bool = False  # a router that never learns: the control of a quality claim

    def __post_init__(self) -> None:
        for key, holds, want in (
            ("keep", 0 < self.keep <= 1, "0 < keep <= 1, a fraction of the tokens"),
            ("every", self.every >= 1, "at least 1"),
            ("first", self.first >= 0, "0 or more"),
            ("router_hidden", self.router_hidden >= 1, "at least 1"),
            ("threshold", 0 < self.cut <= 1, "0 < threshold <= 1, or null"),
            ("temperature", self.temperature > 0, "above 0"),
            ("soft_steps", self.soft_steps >= 0, "0 or more"),
            ("prior", 0 < self.prior < 1, "0 < prior < 1"),
            ("protect", self.protect >= 0, "0 or more tokens"),
            ("min_keep", self.min_keep >= 1, "at least 1 token"),
            ("predictor_loss", self.predictor_loss >= 0, "0 or more"),
            ("ponder_loss", self.ponder_loss >= 0, "0 or more"),
            ("cost_loss", self.cost_loss >= 0, "0 or more"),
            ("budget", self.budget is None or 0 < self.budget <= 1, "0 < budget <= 1, or null"),
            ("budget_rate", self.budget_rate > 0, "above 0"),
            ("curriculum", self.curriculum >= 0, "0 or more steps"),
        ):
            require(holds, f"model.routing.{key}", getattr(self, key), want)
        if not (self.kind in ("halt", "leap") or self.decide == "threshold"):
            why = "keep says how many (not to halt, leap, decide threshold)"
            require(self.budget is None, "model.routing.budget", self.budget, f"null: {why}")
            require(self.cost_loss == 0, "model.routing.cost_loss", self.cost_loss, f"0: {why}")
        if self.kind not in ("skip", "leap"):
            want = "same, or model.routing.kind=skip or leap: nobody is gone by then"
            require(self.decide_at == "same", "model.routing.decide_at", self.decide_at, want)
        if self.kind != "halt":
            want = "act, or model.routing.kind=halt"
            require(self.halting == "act", "model.routing.halting", self.halting, want)
        if not self.softens:
            want = "0, or model.routing.kind=prune, halt or leap"
            if self.kind == "halt":
                want = "0: a sum over 1 ends what act weighs (or halting ponder or tsa)"
            require(self.soft_steps == 0, "model.routing.soft_steps", self.soft_steps, want)
        if self.kind != "prune":
            want = "top, or model.routing.kind=prune"
            require(self.decide == "top", "model.routing.decide", self.decide, want)
            want = "linear, mlp or position, or model.routing.kind=prune"
            require(self.router != "attention", "model.routing.router", self.router, want)
        if self.kind == "merge":
            want = "0.5 <= keep <= 1: each second token may join another"
            require(self.keep >= 0.5, "model.routing.keep", self.keep, want)
            want = "linear (the keys of attention) or position: merging learns nothing"
            require(self.router != "mlp", "model.routing.router", self.router, want)

    @property
    def softens(self) -> bool:
        """Whether there are passes in which everybody is computed, weighed by the router."""
        return self.kind in ("prune", "leap") or (self.kind == "halt" and self.halting != "act")

    @property
    def cut(self) -> float:
        """The threshold, or the usual one."""
        return (0.99 if self.kind == "halt" else 0.5) if self.threshold is None else self.threshold

    @property
    def weighs(self) -> bool:
        """Whether attention sees a token by its mass, not as one."""
        by_mass = self.decide == "threshold" or self.soft_steps > 0
        return self.kind == "merge" or (self.kind == "prune" and by_mass)

    def eased(self, target: float, step: int | None) -> float:
        """What counts in the place of `target` after `step` steps of training; None: it is over."""
        if step is None or step >= self.curriculum:
            return target
        return 1 - (1 - target) * step / self.curriculum

    @property
    def tokens_go(self) -> bool:
        """Whether it is after a block that tokens leave."""
        return self.kind in ("halt", "prune")

    @property
    def tokens_leave(self) -> bool:
        """Whether a token that a block does not compute is gone for good."""
        return self.kind not in ("skip", "leap")

    @property
    def costs(self) -> bool:
        """Whether routers learn to spend less."""
        return self.budget is not None or self.cost_loss > 0

    @property
    def loss_scale(self) -> dict[str, float]:
        """Coefficient of each loss of a router in depth, but for the cost: see `Budget`."""
        return {"predictor": self.predictor_loss, "ponder": self.ponder_loss}
