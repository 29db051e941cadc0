"""Nodes that an autoscaler adds for a run, and a run that wants more than it may add."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import yaml

from moe_router.config_file import config_to_dict

ROOT = Path(__file__).resolve().parents[2]
ROOTS = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(ROOT / "cluster")])
BIN = Path(sys.executable).parent
# Nothing else ends the nodes that the autoscaler starts: they are processes of their own.
UNSHARE = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
UNSHARE += [] if os.getuid() == 0 else ["--user", "--map-root-user"]
COMMANDS = """
ray start --head --port={port} --num-cpus=0 --include-dashboard=false --temp-dir={temp} \
  --object-store-memory=100000000 --autoscaling-config=fake.yaml
python -m moe_router_cluster.cli train tiny.yaml
python -m moe_router_cluster.cli train tiny.yaml --set run.name=large --set cluster.actors=4 \
  --set cluster.wait_s=3 2>&1 || echo "exit code $?"
python -m moe_router_cluster.cli train tiny.yaml --set run.name=large --set cluster.actors=4 \
  --set cluster.wait_s=0 2>&1 || echo "exit code $?"
"""


def namespaces() -> bool:
    if shutil.which("unshare") is None:
        return False
    return subprocess.run([*UNSHARE, "true"], capture_output=True).returncode == 0


def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    fake = {"RAY_FAKE_CLUSTER": "1", "RAY_enable_autoscaler_v2": "0"}
    fake["AUTOSCALER_UPDATE_INTERVAL_S"] = "1"
    ours = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "7" * 64, "RAY_USAGE_STATS_ENABLED": "0"}
    python = {"PATH": f"{BIN}:{kept['PATH']}", "PYTHONPATH": ROOTS, "OMP_NUM_THREADS": "1"}
    return kept | fake | ours | python | {"COLUMNS": "120"}


@pytest.mark.slow
def test_a_run_waits_for_nodes_that_an_autoscaler_adds(tiny, tmp_path):
    if not namespaces():
        pytest.skip("needs unshare of util-linux and the right to make a pid namespace")
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    fake = yaml.safe_load(Path(__file__).with_name("fake_autoscaler.yaml").read_text())
    fake["provider"]["gcs_address"] = f"127.0.0.1:{port}"
    (tmp_path / "fake.yaml").write_text(yaml.safe_dump(fake))
    config = tiny(steps=2, cluster={"cpus_per_actor": 1.0, "address": f"127.0.0.1:{port}"})
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config_to_dict(config)))
    # not a tmp_path: the names of sockets in it must stay below 108 characters
    with tempfile.TemporaryDirectory(prefix="mr-", ignore_cleanup_errors=True) as temp:
        script = COMMANDS.format(port=port, temp=temp)
        done = subprocess.run(
            [*UNSHARE, "bash", "-euc", script],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=tmp_path,
            timeout=200,
            env=environment(),
        )
    said = done.stdout
    assert done.returncode == 0, said
    assert "waiting up to 10:00 for 2 CPUs: the cluster has 0 CPUs and 0 GPUs\n" in said
    assert "2 actors on cpu" in said and "step 2/2" in said
    full = (
        "want 4 CPUs, the cluster has 2 CPUs and 0 GPUs; set cluster.actors=2 or cluster.cpus_per"
    )
    waited, refused = [line for line in said.splitlines() if full in line]
    assert "waiting up to 0:03 for 4 CPUs: the cluster has 2 CPUs and 0 GPUs\n" in said
    assert waited.endswith("; waited cluster.wait_s=3 for nodes to join")
    assert "waited" not in refused
    assert said.count("exit code 1\n") == 2
