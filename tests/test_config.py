"""The ranges of the schema: every refusal names the key, the value and what is wanted."""

import dataclasses

import pytest

from moe_router.config import (
    ClusterConfig,
    Config,
    DataConfig,
    ModelConfig,
    MoEConfig,
    RunConfig,
    TrainConfig,
)
from moe_router.errors import ConfigError

MOE = {"experts": 8, "top_k": 2, "hidden": 16}
MODEL = {"layers": 3, "dim": 32, "heads": 4, "kv_heads": 2, "hidden": 64}
TRAIN = {"steps": 5, "batch": 8}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"top_k": 9}, "model.moe.top_k=9: want 1..8 (model.moe.experts)"),
        ({"top_k": 0}, "model.moe.top_k=0: want 1..8 (model.moe.experts)"),
        ({"expert_groups": 3}, "model.moe.expert_groups=3: want a divisor of 8"),
        ({"expert_groups": 4, "top_groups": 5}, "model.moe.top_groups=5: want 1..4"),
        ({"top_k": 3, "expert_groups": 4}, "model.moe.top_k=3: want at most 2, the experts in"),
        ({"capacity_factor": 0.0}, "model.moe.capacity_factor=0.0: want above 0, or null"),
        ({"jitter": 1.0}, "model.moe.jitter=1.0: want 0 <= jitter < 1"),
        ({"hidden": 0}, "model.moe.hidden=0: want at least 1"),
        ({"policy": "expert_choice", "null_experts": 1}, "model.moe.policy=expert_choice: want no"),
    ],
)
def test_refuses_impossible_routing(change, message):
    with pytest.raises(ConfigError) as caught:
        MoEConfig(**MOE | change)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"dim": 34}, "model.dim=34: want an even multiple of 4 (model.heads)"),
        ({"dim": 12}, "model.dim=12: want an even multiple of 4 (model.heads)"),
        ({"head_dim": 5}, "model.head_dim=5: want a multiple of 2, or null"),
        ({"head_dim": 6, "kind": "vit"}, "model.head_dim=6: want a multiple of 4, or null"),
        ({"kv_heads": 3}, "model.kv_heads=3: want a divisor of 4 (model.heads)"),
        ({"layers": 0}, "model.layers=0: want at least 1"),
        ({"loops": 0}, "model.loops=0: want at least 1"),
        ({"loops": 2, "moe": MoEConfig(**MOE)}, "model.loops=2: want 1 beside model.moe"),
    ],
)
def test_refuses_impossible_models(change, message):
    with pytest.raises(ConfigError) as caught:
        ModelConfig(**MODEL | change)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    "train, actors, message",
    [
        ({"batch": 9}, 2, "train.batch=9: want train.accumulation * a multiple of 2"),
        ({"batch": 8, "accumulation": 3}, 1, "train.batch=8: want a multiple of 3"),
        ({"batch": 8, "accumulation": 4}, 4, "train.batch=8: want train.accumulation * a multiple"),
        ({"batch": 18}, 9, "cluster.actors=9: want at most 8 (model.moe.experts)"),
        ({"lr": 0.0}, 1, "train.lr=0.0: want above 0"),
    ],
)
def test_refuses_impossible_training(train, actors, message):
    with pytest.raises(ConfigError) as caught:
        Config(
            run=RunConfig(name="x"),
            data=DataConfig(source="pydoc"),
            model=ModelConfig(**MODEL, moe=MoEConfig(**MOE)),
            train=TrainConfig(**TRAIN | train),
            cluster=ClusterConfig(actors=actors),
        )
    assert str(caught.value).startswith(message)


def test_own_data_needs_a_path():
    with pytest.raises(ConfigError, match=r"data\.path is missing: data\.source=jsonl reads your"):
        DataConfig(source="jsonl")


def test_static_rows_hold_the_mean_load_at_least():
    with pytest.raises(ConfigError, match=r"^cluster\.row_bound=0\.9: want at least 1, the mean"):
        ClusterConfig(row_bound=0.9)


def test_a_run_name_is_no_path():
    with pytest.raises(ConfigError, match=r"run\.name=a/b: want a folder name"):
        RunConfig(name="a/b")


@pytest.mark.parametrize(
    "first, every, layers", [(0, 1, [0, 1, 2]), (1, 1, [1, 2]), (0, 2, [0, 2]), (1, 2, [1])]
)
def test_which_layers_have_experts(first, every, layers):
    model = ModelConfig(**MODEL, moe=MoEConfig(**MOE, first=first, every=every))
    assert [i for i in range(3) if model.is_moe(i)] == layers
    assert not dataclasses.replace(model, moe=None).is_moe(0)
