"""Whole runs over real actors, in one Ray session: two ranks, a few steps, real text."""

import io
import json
import os
import signal
from pathlib import Path

import pytest
from rich.console import Console
from safetensors import safe_open

from moe_router.config import ClusterConfig
from moe_router.errors import ClusterError, NonFiniteError
from moe_router.observability.csv_log import read_rows
from moe_router_cluster import session
from moe_router_cluster.shard_group import ShardGroup
from moe_router_cluster.train import train

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module", autouse=True)
def ray_here():
    with session.ray_session(ClusterConfig()):
        yield


def run(config, **options) -> tuple[bool, str]:
    out = io.StringIO()
    done = train(config, Console(file=out, width=200), **options)
    return done, out.getvalue()


def folder(config) -> Path:
    return Path(config.run.dir) / config.run.name


def summary(config) -> dict:
    return json.loads((folder(config) / "summary.json").read_text())


def tensors(config) -> dict[str, bytes]:
    """Everything in the last checkpoint, optimizer included, byte for byte."""
    found = {}
    for path in sorted((folder(config) / f"step_{config.train.steps}").glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {key: file.get_tensor(key).numpy().tobytes() for key in file.keys()}  # noqa: SIM118
    assert any("experts.3" in key for key in found)
    return found


def losses(config) -> list[tuple[int, str]]:
    return [(int(row["step"]), row["loss"]) for row in read_rows(folder(config) / "metrics.csv")]


@pytest.fixture
def meddle(monkeypatch):
    """Do something with the group right after its n-th call of a method was sent out."""

    def when(method: str, count: int, then) -> None:
        sent = []
        submit = ShardGroup.submit

        def watched(self, name, *args):
            refs = submit(self, name, *args)
            if name == method:
                sent.append(name)
                if len(sent) == count:
                    then(self)
            return refs

        monkeypatch.setattr(ShardGroup, "submit", watched)

    return when


@pytest.fixture(scope="module")
def clean(tiny_of_module, ray_here):
    """An uninterrupted run, which the others must equal bit for bit."""
    config = tiny_of_module(name="clean", eval_every=4)
    done, said = run(config)
    assert done
    return config, said


def equal_to(clean, config) -> None:
    assert tensors(config) == tensors(clean[0])
    assert losses(config) == losses(clean[0])
    assert [step for step, _ in losses(config)] == list(range(1, config.train.steps + 1))


def test_a_clean_run_leaves_everything_it_should(clean):
    config, said = clean
    for name in ("config.yaml", "metrics.csv", "eval.csv", "sample.json", "report.html"):
        assert (folder(config) / name).stat().st_size > 0, name
    assert (folder(config) / "routing" / "sample.safetensors").is_file()
    facts = summary(config)
    assert (facts["steps"], facts["recoveries"], facts["recovery_log"]) == (12, 0, [])
    assert min(facts[key] for key in ("bits_per_byte", "tokens_per_second", "seconds")) > 0
    assert "held out" in said and "report.html" in said


def test_the_same_command_again_says_that_it_is_finished(clean):
    done, said = run(clean[0])
    assert done and "is finished: 12 steps" in said and "--restart" in said


def test_a_killed_actor_leaves_no_trace_in_the_weights(tiny, clean):
    config = tiny(eval_every=4)
    done, said = run(config, kill="1@0.6")
    assert done and "actor 1 killed at step 7, recovered in " in said
    equal_to(clean, config)
    facts = summary(config)
    assert facts["recoveries"] == 1
    (entry,) = facts["recovery_log"]
    assert (entry["actor"], entry["step"], entry["from_step"]) == ("1", 7, 5)


def test_an_actor_may_die_in_a_checkpoint_and_in_an_evaluation(tiny, clean, meddle):
    meddle("save", 1, lambda group: group.kill(0))
    meddle("evaluate", 3, lambda group: group.kill(1))
    config = tiny(eval_every=4)
    done, said = run(config)
    assert done and "actor 0 lost at step " in said and "actor 1 lost at step " in said
    equal_to(clean, config)


def test_a_frozen_actor_is_found_and_replaced(tiny, clean, meddle):
    frozen = []

    def freeze(group):
        frozen.append(group._homes[1][1])
        os.kill(frozen[0], signal.SIGSTOP)

    meddle("run", 3, freeze)
    config = tiny(eval_every=4, cluster={"timeout_s": 4.0})
    done, said = run(config)
    assert done and "actor 1 lost at step " in said
    assert not Path(f"/proc/{frozen[0]}").exists()
    equal_to(clean, config)


def test_ctrl_c_saves_and_the_same_command_goes_on(tiny, clean, meddle):
    meddle("run", 3, lambda group: os.kill(os.getpid(), signal.SIGINT))
    config = tiny(eval_every=4)
    done, said = run(config)
    assert not done and "stopped: " in said and "the same command goes on" in said
    done, said = run(config)
    assert done and "going on from step " in said
    equal_to(clean, config)


def test_a_run_that_gave_up_goes_on_with_another_number_of_actors(tiny):
    with pytest.raises(ClusterError, match=r"at step 7: loss number 1, want at most 0 \(cluster"):
        run(tiny(cluster={"max_recoveries": 0}), kill="1@0.6")
    done, said = run(tiny(actors=1))
    assert done and "going on from step 5" in said and "1 actor on cpu" in said


def test_a_loss_that_is_not_finite_reaches_the_user_as_it_was_raised(tiny):
    with pytest.raises(NonFiniteError) as raised:
        run(tiny(lr=1e30, clip_norm=0.0, warmup=0))
    assert "\n" not in str(raised.value) and "ray::" not in str(raised.value)


def test_more_actors_than_cpus_are_refused_at_once(tiny):
    config = tiny(cluster={"cpus_per_actor": 1000.0})
    with pytest.raises(ClusterError, match="want 2000 CPUs, the cluster has "):
        run(config)


def test_no_gpu_is_said_at_once(tiny):
    with pytest.raises(ClusterError, match=r"want 2 GPUs, the cluster has .* set .*device=cpu"):
        run(tiny(cluster={"device": "cuda"}))
