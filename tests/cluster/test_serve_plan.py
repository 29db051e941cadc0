"""What is refused before an actor starts, and the file for `serve deploy`. No Ray session."""

import os
import re
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from moe_router.errors import ConfigError, NotCausalError
from moe_router.serving.exposure import Tls
from moe_router.training.loop import Trainer
from moe_router_cluster.run_folder import open_run
from moe_router_cluster.serve_plan import ServeArguments, make_plan, read_token
from tests.tls import certificate

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "cluster" / "serve.yaml"


# Ray Serve's own, when it is imported
pytestmark = pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`")


@pytest.fixture(autouse=True)
def no_token(monkeypatch):
    monkeypatch.delenv("MOE_ROUTER_TOKEN", raising=False)


def saved(config):
    with open_run(config, restart=False) as folder:
        trainer = Trainer(config, run_dir=folder.path)
        trainer.train_step()
        trainer.save(folder.path, wait=True)
    return str(folder.path)


@pytest.fixture
def run(tiny):
    return saved(tiny(actors=1))


def test_any_number_of_ranks_serves_what_any_number_trained(run):
    plan = make_plan(ServeArguments(run=run, actors=3, set=("serve.temperature=0.5",)))
    assert (plan.config.cluster.actors, plan.config.serve.temperature) == (3, 0.5)
    assert (plan.model, plan.step_dir.name, plan.token) == ("tiny", "step_1", None)
    assert make_plan(ServeArguments(run=run)).config.cluster.actors == 1


def test_a_token_is_read_and_never_shown(run, tmp_path, monkeypatch):
    (tmp_path / "token").write_text(" from-file \n")
    monkeypatch.setenv("MOE_ROUTER_TOKEN", "from-variable")
    for file, token in ((str(tmp_path / "token"), "from-file"), (None, "from-variable")):
        plan = make_plan(ServeArguments(run=run, token_file=file))
        assert plan.token == token and token not in repr(plan)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (b"", "token in .*: want printable|token in .*=0 characters: want printable ASCII"),
        (b"two words", "=9 characters: want printable ASCII, no spaces"),
        (b"\xff", "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_what_is_no_token_is_refused(tmp_path, written, message):
    file = tmp_path / "token"
    if written is not None:
        file.write_bytes(written)
    with pytest.raises(ConfigError, match=message) as refused:
        read_token(str(file))
    assert "two words" not in str(refused.value)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"host": "0.0.0.0"}, "host=0.0.0.0: want a token where others can connect"),
        ({"host": "::", "insecure": True}, "host=::: want a token where others can connect"),
        ({"set": ("model.layers=9",)}, "--set=model.layers=9: want a key of cluster or serve"),
        ({"actors": 5}, r"cluster.actors=5: want at most 4 \(model.moe.experts\)"),
        ({"set": ("serve.top_p=2",)}, "serve.top_p=2"),
    ],
)
def test_a_wrong_plan_is_one_line(run, more, message):
    with pytest.raises(ConfigError, match=message) as refused:
        make_plan(ServeArguments(run=run, **more))
    assert "\n" not in str(refused.value)


def test_a_model_that_looks_ahead_is_refused_before_anything_starts(tiny):
    config = tiny(actors=1)
    moe = replace(config.model.moe, policy="expert_choice")
    run = saved(replace(config, model=replace(config.model, moe=moe)))
    with pytest.raises(NotCausalError, match=r"blocks.0.moe: policy=expert_choice"):
        make_plan(ServeArguments(run=run))


def test_unknown_and_missing_arguments_are_named():
    with pytest.raises(ConfigError, match="args=rum: want one of run, actors, set, host"):
        ServeArguments.of({"rum": "x"})
    with pytest.raises(ConfigError, match="args=no run: want run: the path of a run"):
        ServeArguments.of({})


def test_a_port_that_is_taken_is_said_at_once(run):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        roots = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "cluster")]
        done = subprocess.run(
            [sys.executable, "-m", "moe_router_cluster.cli", "serve", run, "--port", str(port)],
            capture_output=True,
            text=True,
            timeout=60,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(roots)},
        )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: --port {port}: cannot listen on 127.0.0.1")


def test_the_config_file_is_what_ray_serve_reads():
    from ray.serve.schema import ServeDeploySchema

    text = FILE.read_text()
    config = yaml.safe_load(text)
    schema = ServeDeploySchema.model_validate(config)
    (app,) = schema.applications
    assert ServeArguments.of(app.args).set == ("cluster.address=auto", "cluster.device=auto")
    assert schema.http_options.host == app.args["host"] == "127.0.0.1"
    (told,) = config["applications"]
    pairs = [(schema, config), (app, told), *zip(app.deployments, told["deployments"], strict=True)]
    for model, got in pairs:
        assert got.keys() <= type(model).model_fields.keys()  # the schema lets misspelt keys pass


def test_every_key_of_the_config_file_is_explained():
    lines = FILE.read_text().splitlines()
    opens = re.compile(r"^\s*(- )?\w+:$")  # a key whose value follows
    told_elsewhere = (
        "port",
        "name",
        "import_path",
        "log_level",
        "num_replicas",
        "ray_actor_options",
    )
    for line in lines:
        bare = line.strip().removeprefix("- ")
        if bare and not bare.startswith("#") and not opens.match(line):
            assert "#" in line or bare.split(":")[0] in told_elsewhere, line


def test_the_config_file_builds_the_application(run):
    from moe_router_cluster import serve_app

    config = yaml.safe_load(FILE.read_text())["applications"][0]
    module, name = config["import_path"].split(":")
    assert module == serve_app.__name__
    getattr(serve_app, name)(config["args"] | {"run": run})
    built = {serve_app.EngineReplica, serve_app.HttpFront, serve_app.GrpcFront}
    assert {d["name"] for d in config["deployments"]} == {each.__name__ for each in built}


def test_others_get_in_by_tls_or_where_that_is_waived(run, tmp_path):
    (tmp_path / "token").write_text("secret")
    pem, key = map(str, certificate(tmp_path))
    mine = {"run": run, "host": "0.0.0.0", "token_file": str(tmp_path / "token")}
    with pytest.raises(ConfigError, match=r"host=0.0.0.0: want TLS where .*\(--insecure\)") as said:
        make_plan(ServeArguments(**mine))
    assert "\n" not in str(said.value)
    plan = make_plan(ServeArguments(**mine, tls_certificate=pem, tls_key=key))
    assert plan.tls is not None and not plan.insecure
    plan = make_plan(ServeArguments(**mine, insecure=True))
    assert plan.tls is None and plan.insecure


def test_tls_wants_a_certificate_and_its_key(run, tmp_path):
    pem, key = map(str, certificate(tmp_path))
    plan = make_plan(ServeArguments(run=run, tls_certificate=pem, tls_key=key))
    assert plan.tls == Tls(Path(pem), Path(key))
    for half in ({"tls_certificate": pem}, {"tls_key": key}):
        with pytest.raises(ConfigError, match="want a certificate and its key, or neither"):
            make_plan(ServeArguments(run=run, **half))
    for wrong in (
        {"tls_certificate": key, "tls_key": pem},
        {"tls_certificate": "x", "tls_key": key},
    ):
        with pytest.raises(ConfigError, match=r"^tls: .*; want PEM files of a certificate and"):
            make_plan(ServeArguments(run=run, **wrong))
