"""What ships in configs/: every key of the schema, commented; routers that cost next to nothing."""

import re
from pathlib import Path

import pytest
import yaml

from moe_router.config_file import config_to_dict, load_config, shipped_configs
from moe_router.cost import cost

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
PATHS = [pytest.param(path, id=path.stem) for path in CONFIGS]


def flat(data, prefix=""):
    """Dotted names of all keys."""
    return {
        name
        for key, value in data.items()
        for name in {f"{prefix}{key}"}
        | (flat(value, f"{prefix}{key}.") if isinstance(value, dict) else set())
    }


def test_the_three_are_there():
    assert {"quickstart", "shakespeare", "enwik8"} <= set(shipped_configs())
    assert list(shipped_configs().values()) == CONFIGS


@pytest.mark.parametrize("path", PATHS)
def test_every_key_is_present(path):
    written = flat(yaml.safe_load(path.read_text()))
    assert flat(config_to_dict(load_config(path))) - written == set()


@pytest.mark.parametrize("path", PATHS)
def test_every_key_is_commented(path):
    keys = re.findall(r"^ *\w+:.*$", path.read_text(), re.MULTILINE)
    sections = {f"{name}:" for name in ("run", "data", "model", "train", "cluster", "serve")}
    assert [line for line in keys if line not in sections and "  # " not in line] == []


@pytest.mark.parametrize("path", PATHS)
def test_the_router_is_small(path):
    total = cost(load_config(path))
    assert 0 < total.router_parameter_share <= 0.01
    assert 0 < total.router_flop_share <= 0.05


def test_a_run_is_named_after_its_config():
    assert [load_config(path).run.name for path in CONFIGS] == [path.stem for path in CONFIGS]


def test_quickstart_is_the_main_job():
    config = load_config("quickstart")
    assert config.cluster.actors == 2 and config.data.source == "pydoc"
    assert config.run.record and config.train.steps % config.train.checkpoint_every
    half = config.train.steps // 2
    # `make demo` kills an actor halfway: some steps are lost, few enough to be made up in seconds
    assert 0 < half % config.train.checkpoint_every <= 30
