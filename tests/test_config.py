"""The ranges of the schema: every refusal names the key, the value and what is wanted."""

import dataclasses
import re

import pytest

from moe_router.config import (
    ClusterConfig,
    Config,
    DataConfig,
    ModelConfig,
    MoEConfig,
    RoutingConfig,
    RunConfig,
    ServeConfig,
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
        ({"router_hidden": 0}, "model.moe.router_hidden=0: want at least 1"),
        ({"balance_loss": -1.0}, "model.moe.balance_loss=-1.0: want 0 or more"),
        ({"z_loss": -1.0}, "model.moe.z_loss=-1.0: want 0 or more"),
        (
            {"sequence_balance_loss": -1.0},
            "model.moe.sequence_balance_loss=-1.0: want 0 or more",
        ),
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
        ({"norm_eps": 0.0}, "model.norm_eps=0.0: want above 0"),
        ({"rope_theta": -3.0}, "model.rope_theta=-3.0: want above 0"),
        ({"moe": MoEConfig(**MOE, first=3)}, "model.moe.first=3: want at most 2: no layer is left"),
        (
            {"layers": 1, "routing": RoutingConfig(kind="halt", first=0)},
            "model.routing.first=0: want more layers: a model of 1 layer has no routed block after",
        ),
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
        ({"beta1": 1.0}, 1, "train.beta1=1.0: want 0 <= beta1 < 1"),
        ({"beta2": -0.1}, 1, "train.beta2=-0.1: want 0 <= beta2 < 1"),
        ({"weight_decay": -1.0}, 1, "train.weight_decay=-1.0: want 0 or more"),
        ({"clip_norm": -1.0}, 1, "train.clip_norm=-1.0: want 0 or more"),
        ({"min_lr": 7.0}, 1, "train.min_lr=7.0: want 0..1, a share of train.lr"),
        ({"eval_every": -1}, 1, "train.eval_every=-1: want 0 or more steps"),
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


def test_held_out_files_are_refused_where_a_part_of_the_text_is_held_out():
    with pytest.raises(
        ConfigError, match=r"^data\.val_path=v\.txt: want null, for data\.source=text"
    ):
        DataConfig(source="text", path="t.txt", val_path="v.txt")


@pytest.mark.parametrize("key", ["cpus_per_actor", "max_recoveries"])
def test_a_cluster_of_less_than_nothing_is_refused(key):
    with pytest.raises(ConfigError, match=rf"^cluster\.{key}=-1: want 0 "):
        ClusterConfig(**{key: -1})


def test_sampling_among_less_than_no_id_is_refused():
    with pytest.raises(ConfigError, match=r"^serve\.top_k=-1: want 1 or more, or 0 for all"):
        ServeConfig(top_k=-1)


def test_a_prompt_that_is_not_utf8_is_refused():
    with pytest.raises(ConfigError, match=r"^serve\.prompt='\\udcff': want text that UTF-8"):
        ServeConfig(prompt=b"\xff".decode(errors="surrogateescape"))


def test_static_rows_hold_the_mean_load_at_least():
    with pytest.raises(ConfigError, match=r"^cluster\.row_bound=0\.9: want at least 1, the mean"):
        ClusterConfig(row_bound=0.9)


@pytest.mark.parametrize("name", ["a/b", ".", "..", ""])
def test_a_run_name_is_no_path(name):
    with pytest.raises(ConfigError, match=rf"^run\.name={re.escape(name)}: want a folder name"):
        RunConfig(name=name)


@pytest.mark.parametrize(
    "first, every, layers", [(0, 1, [0, 1, 2]), (1, 1, [1, 2]), (0, 2, [0, 2]), (1, 2, [1])]
)
def test_which_layers_have_experts(first, every, layers):
    model = ModelConfig(**MODEL, moe=MoEConfig(**MOE, first=first, every=every))
    assert [i for i in range(3) if model.is_moe(i)] == layers
    assert not dataclasses.replace(model, moe=None).is_moe(0)
