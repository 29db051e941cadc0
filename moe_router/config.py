"""The schema of a run: frozen dataclasses, one for each top key of a YAML file in `configs/`.

How a file is read, merged with `--set` and refused is in `config_file.py`.
"""

from dataclasses import dataclass, field
from typing import Literal

from moe_router.errors import ConfigError

# auto: Triton where it runs, torch elsewhere; reference: the specification, plain torch
Kernels = Literal["auto", "triton", "reference"]

RouterKind = Literal["linear", "mlp", "position"]  # position: a control, sees no content


def require(holds: bool, key: str, got: object, want: str) -> None:
    """Refuse a value in one line: which key, what it is, what it must be."""
    if not holds:
        raise ConfigError(f"{key}={got}: want {want}")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    name: str
    dir: str = "runs"  # a run is dir/name
    seed: int = 0
    log_every: int = 1  # steps between rows of metrics.csv
    load_every: int = 10  # steps between rows of load.csv (rows per expert)
    record: bool = False  # write every routing decision of the recorded steps
    record_every: int = 100  # steps

    def __post_init__(self) -> None:
        require(bool(self.name) and "/" not in self.name, "run.name", self.name, "a folder name")
        for key in ("log_every", "load_every", "record_every"):
            require(getattr(self, key) >= 1, f"run.{key}", getattr(self, key), "at least 1 step")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    source: Literal["pydoc", "shakespeare", "enwik8", "text", "jsonl", "csv", "shards"]
    path: str | None = None  # a file, a folder or a glob; shakespeare and enwik8 may download
    field: str = "text"  # the JSONL key or CSV column that holds the text
    tokenizer: str = "bytes"  # or the path of a tokenizer.json
    seq_len: int = 128  # tokens in one row of a batch
    val_fraction: float = 0.1  # the last part of the documents, held out
    cache: str = "data"  # where downloads go

    def __post_init__(self) -> None:
        require(self.seq_len >= 2, "data.seq_len", self.seq_len, "at least 2 tokens")
        require(0 < self.val_fraction < 1, "data.val_fraction", self.val_fraction, "0 < f < 1")
        if self.source in ("text", "jsonl", "csv", "shards") and self.path is None:
            raise ConfigError(f"data.path is missing: data.source={self.source} reads your files")


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

    kind: Literal["skip", "halt", "prune"]
    keep: float = 0.5  # skip: of a sequence, what a routed block computes; prune: what it leaves
    every: int = 2  # every n-th block is routed
    first: int = 1  # blocks before this one are not
    router: RouterKind = "linear"
    router_hidden: int = 64  # width of the mlp router and predictor, features of the position
    predictor: Literal["score", "mlp"] = "score"  # skip: who decides where later tokens are unknown
    predictor_loss: float = 0.01  # coefficient of what teaches it
    threshold: float = 0.99  # halt: sum of halting probabilities at which a token halts
    start: float = -3.0  # halt: logit of that probability before any training
    ponder_loss: float = 0.01  # halt: coefficient of steps plus remainder
    frozen: bool = False  # a router that never learns: the control of a quality claim

    def __post_init__(self) -> None:
        for key, holds, want in (
            ("keep", 0 < self.keep <= 1, "0 < keep <= 1, a fraction of the tokens"),
            ("every", self.every >= 1, "at least 1"),
            ("first", self.first >= 0, "0 or more"),
            ("router_hidden", self.router_hidden >= 1, "at least 1"),
            ("threshold", 0 < self.threshold <= 1, "0 < threshold <= 1"),
            ("predictor_loss", self.predictor_loss >= 0, "0 or more"),
            ("ponder_loss", self.ponder_loss >= 0, "0 or more"),
        ):
            require(holds, f"model.routing.{key}", getattr(self, key), want)

    @property
    def loss_scale(self) -> dict[str, float]:
        """Coefficient of each loss of a router in depth."""
        return {"predictor": self.predictor_loss, "ponder": self.ponder_loss}


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
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
        last = self.layers - (1 if routing.kind == "skip" else 2)
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


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    steps: int
    batch: int  # rows of data.seq_len tokens in one optimizer step, all ranks together
    accumulation: int = 1  # micro-steps in one optimizer step
    lr: float = 1e-3
    warmup: int = 20  # steps of linear warm-up
    min_lr: float = 0.1  # of lr, where the cosine ends
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip_norm: float = 1.0  # of the global gradient; 0 is off
    precision: Literal["fp32", "bf16"] = "fp32"
    dense: Literal["replicated", "fsdp"] = "replicated"
    activation_checkpointing: bool = False
    checkpoint_every: int = 100  # steps
    keep_checkpoints: int = 2
    eval_every: int = 0  # steps; 0 is only at the end
    eval_rows: int = 64  # held-out rows of data.seq_len tokens

    def __post_init__(self) -> None:
        for key in ("steps", "batch", "accumulation", "checkpoint_every", "eval_rows"):
            require(getattr(self, key) >= 1, f"train.{key}", getattr(self, key), "at least 1")
        require(self.keep_checkpoints >= 1, "train.keep_checkpoints", self.keep_checkpoints, "1+")
        require(self.lr > 0, "train.lr", self.lr, "above 0")
        require(self.warmup >= 0, "train.warmup", self.warmup, "0 or more steps")
        require(
            self.batch % self.accumulation == 0,
            "train.batch",
            self.batch,
            f"a multiple of {self.accumulation} (train.accumulation)",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterConfig:
    address: str | None = None  # a running Ray cluster; null starts Ray here
    actors: int = 1  # ExpertShard actors, one rank each
    device: Literal["auto", "cpu", "cuda"] = "auto"
    cpus_per_actor: float = 1.0
    wait_s: float = 600.0  # for nodes that join the cluster at `address`; 0 refuses at once
    timeout_s: float = 120.0  # of a collective, and of an actor that does not answer
    max_recoveries: int = 10  # lost actors after which the run gives up

    def __post_init__(self) -> None:
        require(self.actors >= 1, "cluster.actors", self.actors, "at least 1")
        require(self.wait_s >= 0, "cluster.wait_s", self.wait_s, "0 seconds or more")
        require(self.timeout_s > 0, "cluster.timeout_s", self.timeout_s, "above 0 seconds")


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeConfig:
    """Sampling, for `generate` and for the sample at the end of a run."""

    prompt: str = "The "
    max_new_tokens: int = 200
    temperature: float = 0.8
    top_k: int = 0  # 0 is off
    top_p: float = 1.0

    def __post_init__(self) -> None:
        require(self.max_new_tokens >= 1, "serve.max_new_tokens", self.max_new_tokens, "1 or more")
        require(self.temperature >= 0, "serve.temperature", self.temperature, "0 or more")
        require(0 < self.top_p <= 1, "serve.top_p", self.top_p, "0 < top_p <= 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    run: RunConfig
    data: DataConfig
    model: ModelConfig
    train: TrainConfig
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    kernels: Kernels = "auto"
    serve: ServeConfig = field(default_factory=ServeConfig)

    def __post_init__(self) -> None:
        ranks, rows = self.cluster.actors, self.train.batch // self.train.accumulation
        require(
            rows % ranks == 0,
            "train.batch",
            self.train.batch,
            f"train.accumulation * a multiple of {ranks} (cluster.actors)",
        )
        if self.model.moe is not None:
            require(
                self.model.moe.experts >= ranks,
                "cluster.actors",
                ranks,
                f"at most {self.model.moe.experts} (model.moe.experts)",
            )
