"""The schema of a run: frozen dataclasses, one for each top key of a YAML file in `configs/`.

Those of `data` and `model` are in `config_data.py` and `config_model.py`. How a file is read,
merged with `--set` and refused is in `config_file.py`.
"""

from dataclasses import dataclass, field
from typing import Literal

from moe_router.config_attention import AttentionConfig
from moe_router.config_data import DataConfig, ImageConfig
from moe_router.config_model import (
    ModelConfig,
    MoEConfig,
    RouterConfig,
    RouterKind,
)
from moe_router.config_rebalance import RebalanceConfig
from moe_router.config_routing import RoutingConfig
from moe_router.errors import require

__all__ = [
    "AttentionConfig",
    "ClusterConfig",
    "Config",
    "DataConfig",
    "ImageConfig",
    "Kernels",
    "MoEConfig",
    "ModelConfig",
    "RebalanceConfig",
    "RouterConfig",
    "RouterKind",
    "RoutingConfig",
    "RunConfig",
    "ServeConfig",
    "TrainConfig",
    "Transport",
    "require",
]

# auto: Triton where it runs, torch elsewhere; reference: the specification, plain torch
Kernels = Literal["auto", "triton", "reference"]
# how tokens reach experts on other ranks: docs/dispatch.md
Transport = Literal["auto", "all_to_all", "padded", "gather_scatter", "peer_memory"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    name: str
    dir: str = "runs"  # a run is dir/name
    storage: str | None = None  # of checkpoints: a folder, s3://... or gs://...; null: the run's
    seed: int = 0
    log_every: int = 1  # steps between rows of metrics.csv
    load_every: int = 10  # steps between rows of load.csv (rows per expert)
    record: bool = False  # write every routing decision of the recorded steps
    record_every: int = 100  # steps

    def __post_init__(self) -> None:
        named = self.name not in ("", ".", "..") and "/" not in self.name
        require(named, "run.name", self.name, "a folder name")
        for key in ("log_every", "load_every", "record_every"):
            require(getattr(self, key) >= 1, f"run.{key}", getattr(self, key), "at least 1 step")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    steps: int
    batch: int  # rows of data.seq_len tokens in one optimizer step, all ranks together
    accumulation: int = 1  # micro-steps in one optimizer step
    lr: float = 1e-3
    router_lr: float = 1.0  # times lr: of what decides who is computed
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
    init_from: str | None = None  # run, step or folder of a transformers model to begin with
    learn: Literal["all", "routers"] = "all"

    def __post_init__(self) -> None:
        for key in ("steps", "batch", "accumulation", "checkpoint_every", "eval_rows"):
            require(getattr(self, key) >= 1, f"train.{key}", getattr(self, key), "at least 1")
        require(self.keep_checkpoints >= 1, "train.keep_checkpoints", self.keep_checkpoints, "1+")
        require(self.lr > 0, "train.lr", self.lr, "above 0")
        require(self.router_lr > 0, "train.router_lr", self.router_lr, "above 0, times train.lr")
        for key in ("warmup", "eval_every"):
            require(getattr(self, key) >= 0, f"train.{key}", getattr(self, key), "0 or more steps")
        for key in ("weight_decay", "clip_norm"):
            require(getattr(self, key) >= 0, f"train.{key}", getattr(self, key), "0 or more")
        for key in ("beta1", "beta2"):
            value = getattr(self, key)
            require(0 <= value < 1, f"train.{key}", value, f"0 <= {key} < 1")
        require(0 <= self.min_lr <= 1, "train.min_lr", self.min_lr, "0..1, a share of train.lr")
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
    replicate_every: int = 0  # steps between replicas in peers' memory; 0: none
    spare_s: float = 60.0  # to wait for a lost actor's new place; then fewer actors go on
    transport: Transport = "all_to_all"  # how tokens reach experts of other actors, in training
    expert_ranks: int | None = None  # actors that share one set of experts; null: all of them
    row_bound: float = 2.0  # rows of a static transport, as a multiple of the mean load
    rebalance: RebalanceConfig | None = None  # experts move to even out the load; null: they stay

    def __post_init__(self) -> None:
        require(self.actors >= 1, "cluster.actors", self.actors, "at least 1")
        require(self.wait_s >= 0, "cluster.wait_s", self.wait_s, "0 seconds or more")
        cores = self.cpus_per_actor
        require(cores >= 0, "cluster.cpus_per_actor", cores, "0 cores or more")
        losses = self.max_recoveries
        require(losses >= 0, "cluster.max_recoveries", losses, "0 or more lost actors")
        every = self.replicate_every
        require(every >= 0, "cluster.replicate_every", every, "0 or more steps")
        require(self.spare_s > 0, "cluster.spare_s", self.spare_s, "above 0 seconds")
        require(self.timeout_s > 0, "cluster.timeout_s", self.timeout_s, "above 0 seconds")
        row, wanted = self.expert_ranks, f"null or a divisor of {self.actors} (cluster.actors)"
        fits = row is None or (row >= 1 and self.actors % row == 0)
        require(fits, "cluster.expert_ranks", row, wanted)
        one_set = self.rebalance is None or row in (None, self.actors)
        require(one_set, "cluster.expert_ranks", row, "null, for cluster.rebalance")
        require(self.row_bound >= 1, "cluster.row_bound", self.row_bound, "at least 1, the mean")


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeConfig:
    """Sampling, for `generate`, for the sample at the end of a run, and where a request to a served
    model leaves it open; and what a served model remembers."""

    prompt: str = "The "
    max_new_tokens: int = 200
    temperature: float = 0.8
    top_k: int = 0  # 0 is off
    top_p: float = 1.0
    remember: int = 16_384  # tokens that a rank has room for from the start; what running texts
    # leave of it holds earlier ones, for prompts that begin like them; 0: none

    def __post_init__(self) -> None:
        require(self.remember >= 0, "serve.remember", self.remember, "0 or more tokens")
        # an argument that is not UTF-8 arrives as halves of surrogate pairs
        held = not any("\ud800" <= character <= "\udfff" for character in self.prompt)
        require(held, "serve.prompt", ascii(self.prompt), "text that UTF-8 can hold")
        require(self.max_new_tokens >= 1, "serve.max_new_tokens", self.max_new_tokens, "1 or more")
        require(self.temperature >= 0, "serve.temperature", self.temperature, "0 or more")
        require(self.top_k >= 0, "serve.top_k", self.top_k, "1 or more, or 0 for all")
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
        kinds = {"labelled": "encoder", "images": "vit"}
        want = kinds.get(self.data.source, "causal_lm")
        about = f"{want}, for data.source={self.data.source}"
        require(self.model.kind == want, "model.kind", self.model.kind, about)
        ranks, rows = self.cluster.actors, self.train.batch // self.train.accumulation
        require(
            rows % ranks == 0,
            "train.batch",
            self.train.batch,
            f"train.accumulation * a multiple of {ranks} (cluster.actors)",
        )
        moe = self.model.moe
        if moe is None:
            unmoved = self.cluster.rebalance is None
            require(unmoved, "cluster.rebalance", "a section", "null, for model.moe=null")
        else:
            most = f"at most {moe.experts} (model.moe.experts)"
            require(moe.experts >= ranks, "cluster.actors", ranks, most)
