"""The doctor finds what is there, and says how to mend what is not."""

import re
import resource
import shutil
import socket
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from moe_router import doctor


def only(check):
    (finding,) = check()
    return finding


def test_wants_what_pyproject_wants():
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
    wanted = [re.match(r"([\w-]+)(?:\[.*\])?>=(.+)", d) for d in project["project"]["dependencies"]]
    assert {match[1]: match[2] for match in wanted} == doctor.PACKAGES


def test_every_problem_has_a_fix():
    findings = doctor.examine()
    assert len({finding.name for finding in findings}) == len(findings)
    for finding in findings:
        assert finding.found and bool(finding.fix) == (finding.status != "ok"), finding


@pytest.mark.parametrize(
    "version, least, good",
    [
        ("2.13.0+cpu", "2.11", True),
        ("2.9.1", "2.11", False),  # as text, "2.9" is the greater
        ("10.0", "9", True),
        ("3", "3.0", False),
        ("dev", "1", False),
    ],
)
def test_compares_releases_as_numbers(version, least, good):
    assert (doctor._release(version) >= doctor._release(least)) is good


def test_packages_that_are_missing_or_old(monkeypatch):
    def version(name):
        if name == "ray":
            raise metadata.PackageNotFoundError(name)
        return "2.9" if name == "torch" else "9999"

    monkeypatch.setattr(metadata, "version", version)
    bad = {f.name: f for f in doctor.packages() if f.status != "ok"}
    assert bad.keys() == {"ray", "torch"} and {f.status for f in bad.values()} == {"missing"}
    assert bad["ray"].found == "not installed" and bad["ray"].fix == "pip install 'ray>=2.60'"
    assert bad["torch"].found == "2.9" and bad["torch"].fix == "pip install 'torch>=2.11'"


def test_a_gpu_that_torch_cannot_use(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.version.cuda", None)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    found = {finding.name: finding for finding in doctor.accelerators()}
    assert found["GPU"].status == "weak"
    assert "torch is a CPU build that finds no GPU: install CUDA torch" in found["GPU"].fix


def test_two_gpus_without_nccl(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "H100")
    monkeypatch.setattr("torch.distributed.is_nccl_available", lambda: False)
    monkeypatch.setattr("torch.distributed.is_gloo_available", lambda: False)
    found = {finding.name: finding for finding in doctor.accelerators()}
    assert found["GPU"].found == "2 x H100"
    assert found["NCCL"].status == "weak" and found["gloo"].status == "missing"


def test_small_machines(monkeypatch):
    files = {
        "/proc/meminfo": "MemTotal: 9 kB\nMemAvailable:  8388608 kB\n",
        "/sys/fs/cgroup/memory.max": str(3 << 30),
        "/sys/fs/cgroup/memory.current": str(1 << 30),
        "/sys/fs/cgroup/cpu.max": "150000 100000",
    }
    monkeypatch.setattr(doctor, "_read", files.get)
    memory = only(doctor.memory)
    assert memory.status == "weak" and memory.found == "2.0 GiB available"
    files["/sys/fs/cgroup/memory.max"] = "max"
    assert only(doctor.memory).found == "8.0 GiB available"
    monkeypatch.setattr(doctor.os, "sched_getaffinity", lambda pid: {0, 1, 2}, raising=False)
    assert only(doctor.cores) == doctor.Finding(
        "CPU cores",
        "weak",
        "1.5",
        "set cluster.cpus_per_actor to 0.5 so that two actors fit; slower",
    )
    files["/sys/fs/cgroup/cpu.max"] = "max 100000"
    assert only(doctor.cores).found == "3"


def test_full_and_read_only_disks(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    usage = shutil.disk_usage(tmp_path)._replace(free=1 << 30)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    here, _ = doctor.disk()
    assert here.status == "weak" and here.fix.startswith(f"free space in {tmp_path}")
    monkeypatch.setattr(doctor.os, "access", lambda folder, mode: False)
    here, _ = doctor.disk()
    assert here.status == "missing" and here.found == f"{tmp_path} is read-only"


def test_small_shared_memory(monkeypatch, tmp_path):
    usage = shutil.disk_usage(tmp_path)._replace(free=64 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    found = only(doctor.shared_memory)
    assert found.status == "weak" and "--shm-size=1g" in found.fix


@pytest.mark.parametrize(
    "limits, status, fix",
    [
        ((1024, 524288), "weak", "ulimit -n 65536"),
        ((1024, 2048), "weak", "ulimit -n 2048"),
        ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), "ok", ""),
        ((65536, 65536), "ok", ""),
    ],
)
def test_open_files(monkeypatch, limits, status, fix):
    monkeypatch.setattr(resource, "getrlimit", lambda which: limits)
    found = only(doctor.open_files)
    assert (found.status, found.fix) == (status, fix)


def test_loopback_that_is_down(monkeypatch):
    def down(*args, **kwargs):
        raise OSError(99, "Cannot assign requested address")

    monkeypatch.setattr(socket, "create_server", down)
    found = only(doctor.loopback)
    assert found.status == "missing" and found.found.endswith("Cannot assign requested address")
    assert found.fix == "bring the loopback interface up: ip link set lo up"
