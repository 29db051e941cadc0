from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from moe_router.config import ServeConfig
from moe_router.config_file import config_from_dict
from moe_router.errors import ConfigError
from moe_router_cluster.run_folder import differing, open_run


def test_a_new_run_keeps_its_config(tiny):
    config = tiny(name="new")
    with open_run(config, restart=False) as folder:
        assert not folder.finished
        saved = yaml.safe_load((folder.path / "config.yaml").read_text())
    assert config_from_dict(saved) == config


def test_the_same_config_goes_on_and_a_free_key_may_change(tiny):
    config = tiny()
    with open_run(config, restart=False) as folder:
        (folder.path / "metrics.csv").write_text("step\n")
    changed = replace(
        config,
        cluster=replace(config.cluster, actors=1, timeout_s=5.0),
        serve=ServeConfig(prompt="Once "),
    )
    with open_run(changed, restart=False) as folder:
        assert (folder.path / "metrics.csv").exists()
        saved = yaml.safe_load((folder.path / "config.yaml").read_text())
    assert saved["cluster"]["actors"] == 1


def test_another_config_is_refused_with_the_keys_and_the_fix(tiny):
    with open_run(tiny(steps=12), restart=False) as folder:
        (folder.path / "metrics.csv").write_text("step\n")
    with pytest.raises(ConfigError) as refused, open_run(tiny(steps=13, lr=0.5), restart=False):
        pass
    said = str(refused.value)
    assert "train.lr: 0.001 -> 0.5; train.steps: 12 -> 13" in said
    assert "--restart" in said and "\n" not in said


def test_a_run_that_never_began_takes_another_config(tiny):
    with open_run(tiny(steps=12), restart=False):
        pass  # a typo in data.path, say, was told
    with open_run(tiny(steps=13), restart=False) as folder:
        saved = yaml.safe_load((folder.path / "config.yaml").read_text())
    assert saved["train"]["steps"] == 13 and not folder.finished


def test_restart_moves_the_old_run_aside_and_never_over_another(tiny):
    for steps in (12, 13, 14):
        with open_run(tiny(steps=steps), restart=True) as folder:
            pass
    old = sorted(folder.path.parent.glob("tiny.old-*"))
    kept = [yaml.safe_load((path / "config.yaml").read_text())["train"]["steps"] for path in old]
    assert sorted(kept) == [12, 13]


def test_a_finished_run_says_so(tiny):
    with open_run(tiny(), restart=False) as folder:
        (folder.path / "summary.json").write_text("{}")
    with open_run(tiny(), restart=False) as folder:
        assert folder.finished


def test_a_folder_that_is_no_run_is_left_alone(tiny):
    config = tiny()
    path = Path(config.run.dir) / config.run.name
    path.mkdir(parents=True)
    (path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"exists, but is no run \(no config.yaml\)"):
        open_run(config, restart=False).__enter__()
    assert (path / "thesis.txt").read_text() == "mine"


def test_two_processes_cannot_train_into_one_folder(tiny):
    held, refused = open_run(tiny(), restart=False), open_run(tiny(), restart=False)
    with held, pytest.raises(ConfigError, match="another process trains there"):
        refused.__enter__()
    with open_run(tiny(), restart=False):
        pass


def test_a_damaged_config_is_refused(tiny):
    with open_run(tiny(), restart=False) as folder:
        (folder.path / "config.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="not YAML"):
        open_run(tiny(), restart=False).__enter__()


def test_keys_that_came_or_went_are_differences():
    old = {"model": {"dim": 1}, "cluster": {"actors": 1}}
    new = {"model": {"dim": 1, "moe": None, "heads": 2}, "cluster": {"actors": 4}}
    assert differing(old, new) == ["model.heads: null -> 2"]


def test_a_run_from_before_a_key_came_goes_on(tiny):
    config = tiny()
    with open_run(config, restart=False) as folder:
        saved = folder.path / "config.yaml"
    data = yaml.safe_load(saved.read_text())
    for key in ("labels", "label", "val_path"):
        del data["data"][key]
    del data["model"]["routing"], data["model"]["kind"]
    saved.write_text(yaml.safe_dump(data))
    with open_run(config, restart=False) as folder:
        assert not folder.finished
    data["model"]["dim"] = 64
    saved.write_text(yaml.safe_dump(data))
    (folder.path / "metrics.csv").write_text("step\n")
    with (
        pytest.raises(ConfigError, match=r"another config \(model\.dim: 64 -> 32\)"),
        open_run(config, restart=False),
    ):
        pass
