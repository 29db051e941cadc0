"""A real `ray up` of cluster/local.yaml: two hosts in namespaces, reached by ssh."""

import os
import re
import secrets
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

PROGRAMS = ("unshare", "mount", "ip", "ssh", "ssh-keygen", "rsync", "/usr/sbin/sshd")
MISSING = [program for program in PROGRAMS if shutil.which(program) is None]
# all that is started in them, and all that is mounted, ends with the first process
UNSHARE = ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
COMMANDS = r"""
ray up --yes --no-config-cache {file}
ray dashboard {file} &> /dev/null &
for _ in $(seq 120); do
  ray exec {file} 'ray status' > status 2> /dev/null || true
  grep -F '/{cpus}.0 CPU' status && break
  sleep 1
done
python -m moe_router_cluster.cli submit quickstart --address http://127.0.0.1:8265 {options}
python -m moe_router_cluster.cli jobs --address http://127.0.0.1:8265
ray down --yes {file}
reach="-i key -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
for _ in $(seq 90); do
  for n in 1 2; do ssh $reach 10.0.0.$n 'cat /proc/[0-9]*/stat'; done > stats
  grep -c -E '\((raylet|gcs_server)\) [^Z]' stats > alive || break
  sleep 1
done
echo "left: $(cat alive)"
"""


def cluster_file(folder: Path) -> Path:
    """cluster/local.yaml for hosts that have this Python already, and no network to install by."""
    read = yaml.safe_load((ROOT / "cluster" / "local.yaml").read_text())
    read["auth"] = {"ssh_user": "root", "ssh_private_key": str(folder / "key")}
    path = f"export PATH={BIN}:$PATH RAY_AUTH_MODE=token OMP_NUM_THREADS=1"
    read["setup_commands"] = [f"echo '{path}' >> ~/.bashrc"]
    (folder / "dist").mkdir()
    read["file_mounts"]["~/moe-router/wheels"] = str(folder / "dist")
    file = folder / "local.yaml"
    file.write_text(yaml.safe_dump(read, sort_keys=False))
    return file


def environment(folder: Path) -> dict[str, str]:
    """Of a user whose home is `folder`, and who has a token there."""
    (folder / ".ray").mkdir()
    (folder / ".ray" / "auth_token").write_text(secrets.token_hex(32))
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    roots = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(ROOT / "cluster")])
    ours = {"HOME": str(folder), "TMPDIR": str(folder), "COLUMNS": "120"}
    ray = {"RAY_UP_enable_autoscaler_v2": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    return kept | ours | ray | {"PATH": f"{BIN}:{kept['PATH']}", "PYTHONPATH": roots}


@pytest.mark.slow
@pytest.mark.timeout(420)
@pytest.mark.skipif(os.getuid() != 0, reason="needs root, which makes network namespaces")
@pytest.mark.skipif(
    bool(MISSING),
    reason=f"needs {', '.join(MISSING)}: Debian's openssh-server, openssh-client, rsync, iproute2",
)
def test_ray_up_and_a_training_over_two_hosts(tmp_path):
    if subprocess.run([*UNSHARE, "true"], capture_output=True).returncode != 0:
        pytest.skip("needs the right to make namespaces, which this container lacks")
    small = {"train.steps": 6, "train.warmup": 2, "train.eval_rows": 4, "model.layers": 1}
    # an actor takes all cores of a host, so each host gets one
    cores = os.cpu_count()
    whole = {"cluster.cpus_per_actor": cores, "serve.max_new_tokens": 8}
    sets = small | whole | {"run.dir": tmp_path / "runs"}
    options = " ".join(f"--set {key}={value}" for key, value in sets.items())
    script = COMMANDS.format(cpus=2 * cores, file=cluster_file(tmp_path), options=options)
    hosts = Path(__file__).with_name("two_hosts.sh")
    with (tmp_path / "said").open("w") as file:
        done = subprocess.run(
            [*UNSHARE, "bash", str(hosts), str(tmp_path)],
            input=script,
            stdout=file,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=tmp_path,
            timeout=360,
            env=environment(tmp_path),
        )
    said = (tmp_path / "said").read_text()
    assert done.returncode == 0, said
    assert "2 actors on cpu" in said and "step 6/6 (100%)" in said
    sent = re.search(r"submitted (quickstart-\w+)", said)[1]
    assert f"{sent} succeeded after" in said
    assert re.search(rf"│ {sent} .* succeeded ", said)
    assert f"report      {tmp_path}/runs/quickstart/report.html\n" in said
    assert "left: 0" in said
    assert (tmp_path / "runs" / "quickstart" / "summary.json").is_file()
