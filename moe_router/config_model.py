"""The schema of a model: what `model` holds in a run's config. `config.py` passes it on."""

from dataclasses import dataclass
from typing import Literal

from moe_router.config_attention import AttentionConfig
from moe_router.config_routing import RoutingConfig
from moe_router.errors import require

RouterKind = Literal["linear", "mlp", "position"]  # position: a control, sees no content


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
        for key in ("bias_rate", "balance_loss", "z_loss", "sequence_balance_loss"):
            need(getattr(self, key) >= 0, key, "0 or more")
        need(self.router_hidden >= 1, "router_hidden", "at least 1")
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
class ModelConfig:
    kind: Literal["causal_lm", "encoder", "vit"] = "causal_lm"  # classifiers: of texts, of images
    layers: int
    loops: int = 1  # times that all blocks are run, one after another, with the same weights
    dim: int
    heads: int
    kv_heads: int
    head_dim: int | None = None  # channels of a head; null: dim / heads
    hidden: int  # width of a dense SwiGLU
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    attention: AttentionConfig | None = None  # null: a token attends to all of its sequence
    moe: MoEConfig | None = None  # null: every layer is dense
    routing: RoutingConfig | None = None  # null: every token takes every block

    def __post_init__(self) -> None:
        for key in ("layers", "loops", "dim", "heads", "kv_heads", "hidden"):
            require(getattr(self, key) >= 1, f"model.{key}", getattr(self, key), "at least 1")
        for key in ("rope_theta", "norm_eps"):
            require(getattr(self, key) > 0, f"model.{key}", getattr(self, key), "above 0")
        step = 4 if self.kind == "vit" else 2
        if self.head_dim is None:
            want = f"an even multiple of {self.heads} (model.heads)"
            if step == 4:
                want = f"a multiple of {4 * self.heads}: heads turn by row and by column"
            require(self.dim % (step * self.heads) == 0, "model.dim", self.dim, want)
        else:
            fits = self.head_dim > 0 and self.head_dim % step == 0
            require(fits, "model.head_dim", self.head_dim, f"a multiple of {step}, or null")
        require(
            self.heads % self.kv_heads == 0,
            "model.kv_heads",
            self.kv_heads,
            f"a divisor of {self.heads} (model.heads)",
        )

        if self.moe is not None:
            want = f"at most {self.layers - 1}: no layer is left for experts (or model.moe=null)"
            require(self.moe.first < self.layers, "model.moe.first", self.moe.first, want)
        self._check_attention()
        self._check_routing()

    @property
    def channels(self) -> int:
        """Of a head."""
        return self.dim // self.heads if self.head_dim is None else self.head_dim

    def _check_attention(self) -> None:
        attention, routing = self.attention, self.routing
        if attention is None:
            return
        if attention.clustered:
            want = "blocks, or model.kind=causal_lm: clusters attend to what came before"
            require(self.kind == "causal_lm", "model.attention.select", attention.select, want)
        else:
            least = attention.least(self.kind == "causal_lm")
            want = f"at least {least}, a block and those of model.attention.window="
            want = f"{want}{attention.window}"
            require(attention.top_k >= least, "model.attention.top_k", attention.top_k, want)
        few, want = attention.dense_last < self.layers, f"less than {self.layers} (model.layers)"
        require(few, "model.attention.dense_last", attention.dense_last, want)
        causal = self.kind == "causal_lm" or attention.branch == 0
        want = "0, or model.kind=causal_lm: a tree holds what comes before a block"
        require(causal, "model.attention.branch", attention.branch, want)
        if routing is not None:
            alike = not routing.weighs and routing.router != "attention"
            want = "null where tokens have masses, or attention is counted (model.routing)"
            require(alike, "model.attention", attention.kind, want)
            steady, want = not attention.clustered or attention.noise == 0, "0 beside model.routing"
            want = f"{want}: it names tokens by place"
            require(steady, "model.attention.noise", attention.noise, want)

    def _check_routing(self) -> None:
        routing, moe = self.routing, self.moe
        require(self.loops == 1 or moe is None, "model.loops", self.loops, "1 beside model.moe")
        if routing is None:
            return
        fits = routing.kind in ("skip", "halt", "leap") or self.kind != "causal_lm"
        want = "skip, halt or leap: other tokens leave, and have no logits (or model.kind=encoder)"
        require(fits, "model.routing.kind", routing.kind, want)
        last = min(self.layers - 1, self.steps - (2 if routing.tokens_go else 1))
        many = "layer" if self.layers == 1 else "layers"
        has = f"a model of {self.layers} {many} has no routed block after it"
        want = f"more layers: {has}" if last < 0 else f"at most {last}: {has}"
        require(routing.first <= last, "model.routing.first", routing.first, want)
        if moe is not None:
            steady, jitter = moe.jitter == 0, "0 beside model.routing: it names tokens by place"
            require(steady, "model.moe.jitter", moe.jitter, jitter)

    @property
    def steps(self) -> int:
        """Blocks that a token takes, if it takes all."""
        return self.layers * self.loops

    def routes(self, layer: int, kind: str) -> bool:
        """Whether block `layer` is routed in depth, in this way."""
        routing = self.routing
        if routing is None or routing.kind != kind or layer < routing.first:
            return False
        return (layer - routing.first) % routing.every == 0

    def attends(self, layer: int) -> AttentionConfig | None:
        """How the attention of block `layer` is routed; None: it is dense."""
        attention = self.attention
        dense = attention is None or layer >= self.layers - attention.dense_last
        return None if dense else attention

    def is_moe(self, layer: int) -> bool:
        """Whether block `layer` has experts in the place of its dense SwiGLU."""
        moe = self.moe
        return moe is not None and layer >= moe.first and (layer - moe.first) % moe.every == 0
