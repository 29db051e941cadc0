"""A file becomes a Config, or one line that says where, what, and how to mend it."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_router.config import (
    ClusterConfig,
    Config,
    DataConfig,
    ModelConfig,
    MoEConfig,
    RunConfig,
    TrainConfig,
)
from moe_router.config_file import (
    config_from_dict,
    config_to_dict,
    find_config,
    load_config,
    shipped_configs,
)
from moe_router.errors import ConfigError

TEXT = """
run: {name: a}
data: {source: pydoc}
model:
  layers: 2
  dim: 32
  heads: 2
  kv_heads: 1
  hidden: 64
  moe: {experts: 4, top_k: 2, hidden: 16}
train: {steps: 5, batch: 4, lr: 1e-3}
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(TEXT)
    return path


def refusal(path, *overrides):
    """The error line, without the file it must start with."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    line = str(caught.value)
    assert line.startswith(str(path)) and "\n" not in line
    return line.removeprefix(str(path))


def test_reads_numbers_and_defaults(file):
    config = load_config(file)
    assert config.train.lr == 1e-3  # YAML 1.1 takes 1e-3 for text
    assert config.cluster == ClusterConfig() and config.kernels == "auto"
    whole = load_config(file, ["train.lr=1", "cluster.timeout_s=60"])
    assert (type(whole.train.lr), whole.cluster.timeout_s) == (float, 60.0)


def test_overrides(file):
    config = load_config(file, ["train.steps=7", "train.steps=8", "run.record=true"])
    assert config.train.steps == 8 and config.run.record is True
    assert load_config(file, ["model.moe=null"]).model.moe is None
    assert load_config(file, ["data.path=a=b.txt"]).data.path == "a=b.txt"
    again = load_config(
        file,
        ["model.moe=null", "model.moe.experts=2", "model.moe.top_k=1", "model.moe.hidden=8"],
    )
    assert again.model.moe == MoEConfig(experts=2, top_k=1, hidden=8)


@pytest.mark.parametrize(
    "override, line",
    [
        ("train.stepz=3", ": train.stepz: unknown key; did you mean train.steps?"),
        ("trian.steps=3", ": trian: unknown key; did you mean train?"),
        ("model.moe.topk=3", ": model.moe.topk: unknown key; did you mean model.moe.top_k?"),
        ("1=2", ": 1: unknown key; want one of: run, data, model, train, cluster, kernels, serve"),
        ("train.steps=4.5", ": train.steps=4.5: want a whole number"),
        ("train.steps=1e3", ": train.steps='1e3': want a whole number; write 1000"),
        ("train.steps=400.0", ": train.steps=400.0: want a whole number; write 400"),
        ("train.steps=true", ": train.steps=true: want a whole number"),
        ("train.steps=null", ": train.steps=null: want a whole number"),
        ("train.lr=fast", ": train.lr='fast': want a finite number"),
        ("train.lr=.inf", ": train.lr=inf: want a finite number"),
        ("train.lr=.nan", ": train.lr=nan: want a finite number"),
        ("train.lr=false", ": train.lr=false: want a finite number"),
        ("run.record=1", ": run.record=1: want true or false"),
        ("run.record='true'", ": run.record='true': want true or false; take the quotes off: true"),
        ("run.name=5", ": run.name=5: want text; put it in quotes: '5'"),
        ("train.precision=fp16", ": train.precision='fp16': want fp32 | bf16; did you mean bf16?"),
        ("kernels=[1]", ": kernels=[1]: want auto | triton | reference"),
        ("model.moe.capacity_factor=x", ": model.moe.capacity_factor='x': want a finite number"),
        ("model.moe.top_k=5", ": model.moe.top_k=5: want 1..4 (model.moe.experts)"),
        ("serve=3", ": serve=3: want a section with prompt, max_new_tokens, temperature"),
        ("train.steps.x=3", ": --set train.steps.x=3: train.steps is 5, not a section"),
        ("train.steps", ": --set train.steps: want key=value, such as --set train.steps=100"),
        (".steps=1", ": --set .steps=1: want key=value"),
        ("train.lr=[1", ": --set train.lr=[1:1: expected ',' or ']'"),
    ],
)
def test_refuses_what_is_not_in_the_schema(file, override, line):
    assert refusal(file, override).startswith(line)


@pytest.mark.parametrize(
    "content, line",
    [
        ("", ": is empty; want the sections run, data, model, train, cluster, kernels, serve"),
        ("- run", ": holds ['run']; want the sections run"),
        ("run: [1\ndata: 2", ":2: expected ',' or ']', but got ':'; want valid YAML"),
        ("run: 1\n\tdata: 2", ":2: found character '\\t' that cannot start any token"),
        ("run: 1\ndata: 2\nrun: 3", ":3: found key 'run' twice, first on line 1"),
        ("run: {name: a, name: b}", ":1: found key 'name' twice, first on line 1"),
        ("? [a]\n: 1", ":1: found unhashable key; want valid YAML"),
        ("run: \x00", ": unacceptable character #x0000"),
        ("run: 2026-02-31", ": day is out of range for month; want valid YAML"),
        ("[" * 5000, ": maximum recursion depth exceeded"),
        ("!!python/object:os.system x", ":1: could not determine a constructor for the tag"),
        ("run: {name: a}", ": data: missing key; add it, want a section with source, path"),
        (TEXT.replace("steps: 5, ", ""), ": train.steps: missing key; add it, want a whole number"),
    ],
)
def test_refuses_broken_files(file, content, line):
    file.write_text(content)
    assert refusal(file).startswith(line)


def test_refuses_other_encodings(file):
    file.write_bytes(b"run: \xff")
    assert refusal(file) == ": not UTF-8 at byte 5; save it as UTF-8"


def test_finds_shipped_configs_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = shipped_configs()["quickstart"]
    for name in ("quickstart", "quickstart.yaml", "configs/quickstart.yaml"):
        assert find_config(name) == shipped
    mine = tmp_path / "configs" / "quickstart.yaml"
    mine.parent.mkdir()
    mine.write_text(TEXT)
    assert find_config("configs/quickstart.yaml").resolve() == mine


@pytest.mark.parametrize(
    "name, line",
    [
        ("quickstrat", ": no such file; did you mean quickstart?"),
        ("other/quickstart.yaml", ": no such file; did you mean quickstart?"),
        ("zzz", ": no such file; want a YAML file or one of: demo, enwik8, "),
        ("/", ": is a folder; want a YAML file or one of"),
    ],
)
def test_names_the_config_that_was_meant(tmp_path, monkeypatch, name, line):
    monkeypatch.chdir(tmp_path)
    assert refusal(name).startswith(line)


POSITIVE = st.floats(1e-6, 1e6)
MOES = st.builds(
    MoEConfig,
    experts=st.integers(2, 9),
    top_k=st.integers(1, 2),
    hidden=st.integers(1, 9),
    capacity_factor=st.none() | POSITIVE,
    scale=POSITIVE,
    score=st.sampled_from(["softmax", "sigmoid"]),
    frozen=st.booleans(),
)
CONFIGS = st.builds(
    Config,
    run=st.builds(RunConfig, name=st.from_regex(r"[^/]+", fullmatch=True), seed=st.integers()),
    data=st.builds(DataConfig, source=st.just("text"), path=st.text()),
    model=st.builds(
        lambda moe: ModelConfig(layers=2, dim=8, heads=2, kv_heads=1, hidden=3, moe=moe),
        st.none() | MOES,
    ),
    train=st.builds(TrainConfig, steps=st.integers(1), batch=st.just(4), lr=POSITIVE),
    cluster=st.builds(ClusterConfig, address=st.none() | st.text(), actors=st.sampled_from([1, 2])),
)


@given(config=CONFIGS)
@settings(max_examples=25, deadline=None)
def test_round_trip(config):
    data = config_to_dict(config)
    assert config_from_dict(data) == config
    names = {field.name for field in dataclasses.fields(Config)}
    assert set(data) == names


def test_errors_start_with_the_source():
    with pytest.raises(ConfigError, match=r"^actor 1: run: missing key; add it, want a section"):
        config_from_dict({}, "actor 1")
