"""The schema of a model: what `model` holds in a run's config. `config.py` passes it on."""

from dataclasses import dataclass
from typing import Literal

from moe_router.errors import ConfigError

RouterKind = Literal["linear", "mlp", "position"]  # position: a control, sees no content
DepthRouterKind = Literal["linear", "mlp", "position", "attention"]  # attention: what is received


def require(holds: bool, key: str, got: object, want: str) -> None:
    """Refuse a value in one line: which key, what it is, what it must be."""
    if not holds:
        raise ConfigError(f"{key}={got}: want {want}")


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterConfig:
    """How tokens choose among E experts. Equations: docs/routing.md."""

    experts: int
    top_k: int
    policy: Literal["top_k", "expert_choice"] = "top_k"
    score: Literal["softmax", "sigmoid"] = "softmax"
    router: RouterKind = "linear"
    router_hidden: int = 64  # width of the mlp router, features of the position router
    renormalise: bool = True  # weights of a token sum to 1
    scale: float = 1.0  # factor on every weight
    straight_through: bool = False  # weight 1/K forward, the score's gradient backward
    null_experts: int = 0  # choices that cost nothing
    expert_groups: int = 1  # group-limited choice: groups of neighbouring experts
    top_groups: int = 1  # groups a token may choose from
    bias_rate: float = 0.0  # aux-loss-free balancing: step of the score bias
    jitter: float = 0.0  # input times U(1 - j, 1 + j) in training
    capacity_factor: float | None = None  # multiple of the mean load; None is dropless
    drop: Literal["position", "score"] = "position"  # who loses when an expert is full
    balance_loss: float = 0.01  # coefficient of the Switch loss
    z_loss: float = 0.0
    sequence_balance_loss: float = 0.0
    frozen: bool = False  # a router that never learns: the control of a quality claim

    def __post_init__(self) -> None:
        E, groups = self.experts, self.expert_groups

        def need(holds: bool, key: str, want: str) -> None:
            require(holds, f"model.moe.{key}", getattr(self, key), want)

        need(E >= 1, "experts", "at least 1")
        need(1 <= self.top_k <= E, "top_k", f"1..{E} (model.moe.experts)")
        divides = groups >= 1 and E % groups == 0
        need(divides, "expert_groups", f"a divisor of {E} (model.moe.experts)")
        in_groups = 1 <= self.top_groups <= groups
        need(in_groups, "top_groups", f"1..{groups} (model.moe.expert_groups)")
        reachable = self.top_groups * E // groups + self.null_experts
        few = self.top_k <= reachable
        need(few, "top_k", f"at most {reachable}, the experts in top_groups groups")
        bounded = self.capacity_factor is None or self.capacity_factor > 0
        need(bounded, "capacity_factor", "above 0, or null for dropless")
        need(self.null_experts >= 0, "null_experts", "0 or more")
        need(0 <= self.jitter < 1, "jitter", "0 <= jitter < 1")
        need(self.bias_rate >= 0, "bias_rate", "0 or more")
        if self.policy == "expert_choice":
            alone = self.null_experts == 0 and groups == 1 and self.bias_rate == 0
            need(alone, "policy", "no null_experts, expert_groups or bias_rate beside it")


@dataclass(frozen=True, kw_only=True, slots=True)
class MoEConfig(RouterConfig):
    hidden: int  # width F of one expert
    shared_hidden: int = 0  # width of the expert that every token visits; 0 is none
    every: int = 1  # every n-th layer is MoE, the others dense
    first: int = 0  # layers before this one are dense

    def __post_init__(self) -> None:
        RouterConfig.__post_init__(self)
        require(self.hidden >= 1, "model.moe.hidden", self.hidden, "at least 1")
        require(self.shared_hidden >= 0, "model.moe.shared_hidden", self.shared_hidden, "0 or more")
        require(self.every >= 1, "model.moe.every", self.every, "at least 1")
        require(self.first >= 0, "model.moe.first", self.first, "0 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutingConfig:
    """Which blocks a token takes. Equations: docs/routing.md."""

    kind: Literal["skip", "halt", "leap", "prune", "merge"]
    decide: Literal["top", "threshold"] = "top"  # prune: the best of a sequence, or those above
    keep: float = 0.5  # skip: of a sequence, what a routed block computes; prune: what it leaves
    threshold: float | None = None  # halt: of the sum (null: 0.99); prune, leap: least (null: 0.5)
    temperature: float = 0.1  # prune: width of the soft threshold that gradients see
    soft_steps: int = 0  # prune: first training steps in which no token leaves, but weighs less
    protect: int = 1  # prune, leap: first tokens of a sequence that always stay
    min_keep: int = 1  # prune: tokens of a sequence that stay at least
    every: int = 2  # every n-th block is routed
    first: int = 1  # blocks before this one are not
    router: DepthRouterKind = "linear"
    router_hidden: int = 64  # width of the mlp router and predictor, features of the position
    predictor: Literal["score", "mlp"] = "score"  # skip: who decides where later tokens are unknown
    predictor_loss: float = 0.01  # coefficient of what teaches it
    start: float = -3.0  # halt, leap: logit of its probability before any training
    ponder_loss: float = 0.01  # halt: coefficient of steps plus remainder
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
            free = self.budget is None and self.cost_loss == 0
            want = "null, and cost_loss 0: keep says how many (not to halt, leap, decide threshold)"
            require(free, "model.routing.budget", self.budget, want)
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
    def cut(self) -> float:
        """The threshold, or the usual one."""
        return (0.99 if self.kind == "halt" else 0.5) if self.threshold is None else self.threshold

    @property
    def weighs(self) -> bool:
        """Whether attention sees a token by its mass, not as one."""
        return self.kind == "merge" or self.decide == "threshold"

    def eased(self, target: float, step: int | None) -> float:
        """What counts in the place of `target` after `step` steps of training; None: it is over."""
        if step is None or step >= self.curriculum:
            return target
        return 1 - (1 - target) * step / self.curriculum

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


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    kind: Literal["causal_lm", "encoder", "vit"] = "causal_lm"  # classifiers: of texts, of images
    layers: int
    dim: int
    heads: int
    kv_heads: int
    hidden: int  # width of a dense SwiGLU
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    moe: MoEConfig | None = None  # null: every layer is dense
    routing: RoutingConfig | None = None  # null: every token takes every block

    def __post_init__(self) -> None:
        for key in ("layers", "dim", "heads", "kv_heads", "hidden"):
            require(getattr(self, key) >= 1, f"model.{key}", getattr(self, key), "at least 1")
        require(
            self.dim % self.heads == 0 and self.dim // self.heads % 2 == 0,
            "model.dim",
            self.dim,
            f"an even multiple of {self.heads} (model.heads)",
        )
        if self.kind == "vit":
            want = f"a multiple of {4 * self.heads}: heads turn by row and by column"
            require(self.dim % (4 * self.heads) == 0, "model.dim", self.dim, want)
        require(
            self.heads % self.kv_heads == 0,
            "model.kv_heads",
            self.kv_heads,
            f"a divisor of {self.heads} (model.heads)",
        )

        self._check_routing()

    def _check_routing(self) -> None:
        routing, moe = self.routing, self.moe
        if routing is None:
            return
        fits = routing.kind in ("skip", "halt", "leap") or self.kind != "causal_lm"
        want = "skip, halt or leap: other tokens leave, and have no logits (or model.kind=encoder)"
        require(fits, "model.routing.kind", routing.kind, want)
        last = self.layers - (2 if routing.kind in ("halt", "prune") else 1)
        want = f"at most {last}: a model of {self.layers} layers has no routed block after it"
        require(routing.first <= last, "model.routing.first", routing.first, want)
        if moe is not None:
            steady, jitter = moe.jitter == 0, "0 beside model.routing: it names tokens by place"
            require(steady, "model.moe.jitter", moe.jitter, jitter)

    def routes(self, layer: int, kind: str) -> bool:
        """Whether block `layer` is routed in depth, in this way."""
        routing = self.routing
        if routing is None or routing.kind != kind or layer < routing.first:
            return False
        return (layer - routing.first) % routing.every == 0

    def is_moe(self, layer: int) -> bool:
        """Whether block `layer` has experts in the place of its dense SwiGLU."""
        moe = self.moe
        return moe is not None and layer >= moe.first and (layer - moe.first) % moe.every == 0
