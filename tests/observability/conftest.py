"""Runs that look real, made in milliseconds: a falling noisy loss, experts that settle into
balance, a lost actor, a sample whose tokens prefer experts by what they spell."""

import json
import math
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch
import yaml

from moe_router.config import (
    ClusterConfig,
    Config,
    DataConfig,
    ModelConfig,
    MoEConfig,
    RunConfig,
    TrainConfig,
)
from moe_router.observability.metrics import MetricsWriter, write_summary
from moe_router.observability.records import EvalRecord, StepRecord
from moe_router.observability.trace import LayerTrace, Trace, save_trace

PROMPT = "The "
STORY = (
    "statement is used to import a module, or to bind names that the module defines. "
    'If the list of names is empty, an object of class "type" is created:\n\n'
    "    >>> class Router(object):\n    ...     def __init__(self, experts):\n"
    "    ...\t        self.experts = experts\n\n"
    "It is an error to call <script>alert(1)</script> & friends with more than 8 arguments; "
    "such expressions raise a ValueError. Naïve callers see \x07 and \x1b.\n"
)


@dataclass(frozen=True)
class Spec:
    """What kind of run to make."""

    name: str = "quickstart"
    steps: int = 400
    layers: int = 4
    experts: int = 8
    top_k: int = 2
    capacity: bool = True
    moe: bool = True
    sample: str = PROMPT + STORY
    finished: bool = True
    log_every: int = 1
    load_every: int = 10


def config_of(spec: Spec) -> Config:
    moe = MoEConfig(experts=spec.experts, top_k=spec.top_k, hidden=128, balance_loss=0.01)
    return Config(
        run=RunConfig(name=spec.name, log_every=spec.log_every, load_every=spec.load_every),
        data=DataConfig(source="pydoc"),
        model=ModelConfig(
            layers=spec.layers,
            dim=128,
            heads=4,
            kv_heads=2,
            hidden=384,
            moe=moe if spec.moe else None,
        ),
        train=TrainConfig(steps=spec.steps, batch=16),
        cluster=ClusterConfig(actors=2),
    )


def step_record(spec: Spec, step: int, rng: random.Random) -> StepRecord:
    done = step / spec.steps
    loss = 1.45 + 4.1 * math.exp(-done * 9) + 0.35 * (1 - done) + rng.gauss(0, 0.05)
    load_LE = [_load(spec, layer, done, rng) for layer in range(spec.layers)] if spec.moe else []
    rows = sum(map(sum, load_LE))
    dropped = int(rows * 0.06 * math.exp(-done * 4)) if spec.capacity else 0
    flops = 6 * 128 * 128
    return StepRecord(
        step=step,
        loss=loss,
        losses={"balance": 1 + 0.4 * math.exp(-done * 6), "z": 0.3 + done} if spec.moe else {},
        grad_norm=0.6 + 2 * math.exp(-done * 20) + abs(rng.gauss(0, 0.1)),
        lr=1e-3 * min(1.0, step / 20) * (0.55 + 0.45 * math.cos(math.pi * done)),
        tokens=2048,
        seconds=0.16 + abs(rng.gauss(0, 0.01)),
        load_LE=load_LE,
        rows=rows,
        dropped=dropped,
        executed_flops=(rows - dropped) * flops,
        dense_flops=rows * flops,
    )


def _load(spec: Spec, layer: int, done: float, rng: random.Random) -> list[int]:
    mean, spread = 2048 * spec.top_k / spec.experts, 0.9 * math.exp(-done * 5) + 0.06
    taste = random.Random(layer)
    pulls = [taste.gauss(0, 1) for _ in range(spec.experts)]
    return [max(0, int(mean * math.exp(spread * p + rng.gauss(0, 0.04)))) for p in pulls]


def sample_trace(spec: Spec, ids: list[int]) -> Trace:
    """The routing of all tokens but the last, which never went in."""
    T, made = len(ids) - 1, torch.Generator().manual_seed(0)
    layers = {}
    for layer in range(spec.layers):
        taste = torch.randn(257, spec.experts, generator=made)
        logits = taste[torch.tensor(ids[:T]) % 257] * 2
        logits += torch.randn(T, spec.experts, generator=made)
        weight, target = logits.softmax(-1).topk(spec.top_k)
        kept = torch.rand(T, spec.top_k, generator=made) > (0.04 if spec.capacity else 0)
        weight = weight / weight.sum(-1, keepdim=True)
        layers[layer] = LayerTrace(spec.experts, target.int(), weight, kept)
    at = torch.arange(T)
    return Trace(at, torch.tensor(ids[:T]), at.int(), layers)


def build_run(run_dir: Path, spec: Spec) -> Path:
    """All files of a run but the report and the checkpoints."""
    rng, config = random.Random(1), config_of(spec)
    with MetricsWriter(run_dir, config.run) as metrics:
        for step in range(1, spec.steps + 1):
            record = step_record(spec, step, rng)
            metrics.write(record)
            if step % max(1, spec.steps // 8) == 0:
                bits = (record.loss + 0.05) / math.log(2)
                metrics.write_eval(EvalRecord(step, record.loss + 0.05, bits, 4.83, 8192))
    (run_dir / "config.yaml").write_text(yaml.safe_dump(asdict(config)))
    if spec.sample:
        _write_sample(run_dir, spec)
    if spec.finished:
        lost = [{"step": spec.steps // 2, "seconds": 3.42, "actor": 1}]
        write_summary(
            run_dir,
            bits_per_byte=2.314,
            unigram_bits_per_byte=4.83,
            seconds=spec.steps * 0.17,
            tokens_per_second=12480.0,
            steps=spec.steps,
            recoveries=1,
            recovery_log=lost,
            parameters=3_512_064,
        )
    return run_dir


def _write_sample(run_dir: Path, spec: Spec) -> None:
    raw = spec.sample.encode()
    texts = [bytes([b]).decode("utf-8", "replace") for b in raw]
    sample = {
        "prompt": PROMPT,
        "text": spec.sample,
        "token_ids": list(raw),
        "token_text": texts,
    }
    (run_dir / "sample.json").write_text(json.dumps(sample))
    if spec.moe:
        save_trace(sample_trace(spec, list(raw)), run_dir / "routing" / "sample.safetensors")


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """make_run(steps=..., experts=...) is the folder of a new run; see Spec."""

    def make(**fields: object) -> Path:
        spec = Spec(**fields)  # type: ignore[arg-type]
        return build_run(tmp_path / spec.name, spec)

    return make


@pytest.fixture
def make_record() -> Callable[..., StepRecord]:
    """make_record(step, **changes): a step of a small run."""

    def make(step: int, **changes: object) -> StepRecord:
        fields = asdict(step_record(Spec(steps=50, layers=2), step, random.Random(step)))
        return StepRecord(**{**fields, **changes})

    return make
