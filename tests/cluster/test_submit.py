"""Training as a Ray Job: a real head with its job server, the command as a user types it."""

import contextlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from moe_router.config_file import config_to_dict
from moe_router.errors import ClusterError, ConfigError
from moe_router_cluster.follow import LogView
from moe_router_cluster.jobs import Jobs, for_cluster

pytestmark = pytest.mark.timeout(240)
ROOT = Path(__file__).resolve().parents[2]
ROOTS = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(ROOT / "cluster")])
TOKEN = "7" * 64


def environment(**more: str) -> dict[str, str]:
    """Of a user with a token, whose python is this one."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    ours = {"PATH": path, "RAY_AUTH_TOKEN": TOKEN, "RAY_USAGE_STATS_ENABLED": "0"}
    return kept | {"OMP_NUM_THREADS": "1", "COLUMNS": "120"} | ours | more


def free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@pytest.fixture(scope="module")
def address():
    """http://HOST:PORT of a head of this module's own, apart from any other Ray here."""
    port, dashboard, agent = free_ports(3)
    # not a tmp_path: the names of sockets in it must stay below 108 characters
    with tempfile.TemporaryDirectory(prefix="mr-", ignore_cleanup_errors=True) as folder:
        ray = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block"]
        ports = [f"--port={port}", f"--dashboard-port={dashboard}"]
        more = [f"--dashboard-agent-listen-port={agent}", f"--temp-dir={folder}", "--num-cpus=4"]
        head = subprocess.Popen(
            [*ray, "--object-store-memory=100000000", *ports, *more],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment(RAY_AUTH_MODE="token"),
        )
        try:
            said = []
            while not said or "Ray runtime started" not in said[-1]:
                said.append(head.stdout.readline())
                assert said[-1], "".join(said)
            yield f"http://127.0.0.1:{dashboard}"
        finally:
            head.terminate()  # with --block, it takes its processes along
            head.communicate(timeout=60)


def start(*arguments: str, cwd: Path, **env: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "moe_router_cluster.cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env=environment(PYTHONPATH=ROOTS) | env,
    )


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    return process.returncode, out, err


def command(*arguments: str, cwd: Path, **env: str) -> tuple[int, str, str]:
    return finish(start(*arguments, cwd=cwd, **env))


def written(path: Path, config) -> str:
    path.write_text(yaml.safe_dump(config_to_dict(config)))
    return str(path)


@pytest.fixture(scope="module")
def submitted(address, tiny_of_module, tmp_path_factory):
    """A training that ends well and one that cannot, at once: (runs, what each command gave)."""
    folder = tmp_path_factory.mktemp("submitted")
    good = tiny_of_module(name="a good one", steps=6)
    config = written(folder / "good.yaml", good)
    bad = ("--set", "run.name=bad", "--set", "data.source=text", "--set", "data.path=/nowhere")
    at = ("--address", address)
    both = [
        start("submit", config, *at, cwd=folder),
        start("submit", config, *at, *bad, cwd=folder),
    ]
    return Path(good.run.dir), *map(finish, both)


def test_a_training_is_followed_to_its_end(submitted):
    runs, (code, out, err), _ = submitted
    assert (code, err) == (0, ""), out
    assert re.match(r"submitted a-good-one-[0-9a-f]{6} to http://127", out)
    assert "2 actors on cpu" in out and "step 6/6 (100%)" in out
    assert re.search(r"a-good-one-[0-9a-f]{6} succeeded after 0:\d\d\n$", out)
    assert json.loads((runs / "a good one" / "summary.json").read_text())["steps"] == 6


def test_a_job_that_fails_is_one_line_and_exit_code_1(submitted):
    _, _, (code, out, err) = submitted
    assert code == 1
    assert "error: data.path=/nowhere: no such file" in out
    assert re.fullmatch(
        r"error: bad-\w+ failed: Job entrypoint command failed with exit code 1; its log is above, "
        r"and by moe-router jobs bad-\w+ --address http://\S+\n",
        err,
    )


def test_jobs_are_listed_and_followed_again(submitted, address, tmp_path):
    id = re.search(r"a-good-one-[0-9a-f]{6}", submitted[1][1])[0]
    at = ("--address", address)
    every = [start("jobs", *more, *at, cwd=tmp_path) for more in ((), (id,), ("--stop", id))]
    (code, out, err), followed, stopped = map(finish, every)
    assert (code, err) == (0, "")
    rows = [line.replace("│", " ").split() for line in out.splitlines() if "│" in line]
    assert {"bad", "failed"} < set(next(row for row in rows if row[0].startswith("bad-")))
    assert {id, "succeeded"} < set(next(row for row in rows if row[0] == id))
    assert followed == (0, submitted[1][1].partition("\n")[2], "")
    assert stopped == (0, f"{id} had ended already\n", "")


def test_what_the_server_refuses_is_one_line(address, tmp_path):
    unknown = f"nope-1: no such job at {address}; `moe-router jobs --address"
    cases = [
        (["nope-1"], {}, unknown),
        (["--stop", "nope-1"], {}, unknown),
        ([], {"RAY_AUTH_TOKEN": "8" * 64}, f"--address={address}: the cluster refuses this token"),
        ([], {"RAY_AUTH_MODE": "disabled"}, f"--address={address}: the cluster wants a token; `ra"),
    ]
    asked = [
        start("jobs", *what, "--address", address, cwd=tmp_path, **env) for what, env, _ in cases
    ]
    for (code, out, err), (_, _, said) in zip(map(finish, asked), cases, strict=True):
        assert (code, out) == (1, "")
        assert err.startswith(f"error: {said}") and err.count("\n") == 1


@pytest.mark.slow
def test_ctrl_c_looks_away_and_stop_saves_a_checkpoint(address, tiny, tmp_path):
    config = tiny(name="long", steps=100_000, checkpoint_every=50_000)
    path = written(tmp_path / "long.yaml", config)
    process = start("submit", path, "--address", address, cwd=tmp_path)
    id = re.search(r"long-[0-9a-f]{6}", process.stdout.readline())[0]
    while "step " not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    code, out, err = finish(process)
    assert (code, err) == (130, "")
    assert f"detached; {id} goes on. Look again: moe-router jobs {id} --address {address}\n" in out
    code, out, err = command("jobs", "--stop", id, "--address", address, cwd=tmp_path)
    assert (code, out, err) == (0, f"{id} saves a checkpoint and ends\n", "")
    code, out, err = command("jobs", id, "--address", address, cwd=tmp_path)
    assert (code, err) == (130, "")
    assert "stopped: " in out and f"{id} was stopped after" in out
    assert len(list((tmp_path / "runs" / "long").glob("step_*/state.json"))) == 1


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("http://127.0.0.1:1", r"no job server there \(Connection refused\); want http://HOST"),
        ("127.0.0.1:8265", "no address of a job server; want http://HOST:PORT"),
        ("ray://10.0.0.1:10001", "no address of a job server; want http://HOST:PORT"),
        ("http://10.0.0.1:many", "Port could not be cast .*; want http://HOST:PORT"),
    ],
)
def test_an_address_without_a_server_is_refused_at_once(address, said):
    with pytest.raises(ClusterError, match=f"--address={address}: {said}"):
        Jobs(address)


def test_a_config_goes_to_a_cluster_with_the_clusters_paths(tiny):
    config = tiny(cluster={"address": "10.0.0.1:6379"})
    sent = for_cluster(config)
    assert sent == replace(config, cluster=replace(config.cluster, address="auto"))
    for section, key in (("run", "dir"), ("data", "path"), ("data", "tokenizer")):
        changed = replace(getattr(config, section), **{key: "some/where"})
        said = f"{section}.{key}=some/where: relative, .* --set {section}.{key}=/mnt/some/where"
        with pytest.raises(ConfigError, match=said):
            for_cluster(replace(config, **{section: changed}))


def test_a_log_in_pieces_is_whole_lines_once():
    console = Console(file=io.StringIO(), width=40)
    with LogView(console) as view:
        view.feed("one\ntw")
        view.again()  # the connection broke, the log comes anew
        view.feed("one")
        view.feed("\ntwo [bold]\nstep 5/10 (50%)  loss 2.5\nlast")
    assert console.file.getvalue() == "one\ntwo [bold]\nstep 5/10 (50%)  loss 2.5\nlast\n"


def test_on_a_terminal_steps_move_a_bar():
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    with LogView(console) as view:
        view.feed("starting\nstep 5/10 (50%)  loss 2.5\n")
        view.feed("step 10/10 (100%)  loss 1.5\n")
    shown = console.file.getvalue()
    assert "starting\n" in shown and "10/10 ━" in shown and "loss 1.5" in shown
    assert "(100%)" not in shown


@pytest.mark.parametrize("name", ["gpu.yaml", "gpu-gcp.yaml", "local.yaml"])
def test_a_cluster_file_is_one_that_ray_up_takes(name):
    from ray.autoscaler._private.util import prepare_config, validate_config

    read = yaml.safe_load((ROOT / "cluster" / name).read_text())
    whole = prepare_config(read)
    validate_config(whole)
    assert whole["head_node_type"] in whole["available_node_types"]
    [head] = [line for line in read["head_start_ray_commands"] if "ray start" in line]
    assert "--dashboard-host=127.0.0.1" in head and "--dashboard-port=8265" in head
    starts = [head, *read["worker_start_ray_commands"][1:]]
    assert all("RAY_AUTH_MODE=token ray start" in line for line in starts)
    assert "~/.ray/auth_token" in read["file_mounts"].values()
    for which in ("head_setup_commands", "worker_setup_commands"):
        assert any("moe_router-*.whl" in line for line in whole[which])
