import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from moe_router.config import (
    ClusterConfig,
    Config,
    DataConfig,
    ModelConfig,
    MoEConfig,
    RunConfig,
    ServeConfig,
    TrainConfig,
)

# Ray reads these when it is imported: a token of our own, and no file in the home folder
os.environ.setdefault("RAY_AUTH_TOKEN", "0" * 64)
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


def make_tiny(
    runs: Path, *, name: str = "tiny", steps: int = 12, actors: int = 2, cluster=None, **train
) -> Config:
    """A model so small that a step takes milliseconds."""
    plain = TrainConfig(steps=steps, batch=4, warmup=2, checkpoint_every=5, eval_rows=4)
    moe = MoEConfig(experts=4, top_k=2, hidden=32)
    return Config(
        run=RunConfig(name=name, dir=str(runs), seed=3),
        data=DataConfig(source="pydoc", seq_len=32),
        model=ModelConfig(layers=2, dim=32, heads=2, kv_heads=1, hidden=64, moe=moe),
        train=replace(plain, **train),
        cluster=replace(
            # half a CPU: two actors fit into any machine
            ClusterConfig(actors=actors, device="cpu", cpus_per_actor=0.5, timeout_s=20.0),
            **(cluster or {}),
        ),
        serve=ServeConfig(max_new_tokens=8),
    )


@pytest.fixture
def tiny(tmp_path) -> Callable[..., Config]:
    """`make_tiny` in a folder of the test's own."""
    return partial(make_tiny, tmp_path / "runs")


@pytest.fixture(scope="module")
def tiny_of_module(tmp_path_factory) -> Callable[..., Config]:
    return partial(make_tiny, tmp_path_factory.mktemp("module"))
