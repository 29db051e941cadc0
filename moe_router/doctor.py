"""What this machine has and lacks, each with the fix. Looks, and changes nothing.

Nothing is imported to be found but torch: versions come from the packages' metadata.
"""

import os
import re
import resource
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

Status = Literal["ok", "weak", "missing"]
_GIB = 1 << 30
# as in pyproject.toml, by test
PACKAGES = {
    "torch": "2.11",
    "ray": "2.60",
    "grpcio": "1.84",
    "grpcio-reflection": "1.84",
    "protobuf": "7.35",
    "fastapi": "0.165",
    "uvicorn": "0.54",
    "jinja2": "3.1",
    "pyyaml": "6",
    "typer": "0.29",
    "rich": "15",
    "safetensors": "0.8",
    "numpy": "2",
    "matplotlib": "3.10",
    "tensorboard": "2.21",
    "tokenizers": "0.23",
    "fsspec": "2026.2",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        status: "ok"; "weak": works, but slower or with less; "missing": training cannot start.
        found: what is there.
        fix: what to do about it; "" if it is ok.
    """

    name: str
    status: Status
    found: str
    fix: str = ""


def examine() -> list[Finding]:
    """Look at everything, in the order in which one would mend it."""
    return [finding for check in CHECKS for finding in check()]


def python() -> Iterator[Finding]:
    found = ".".join(map(str, sys.version_info[:3]))
    good = sys.version_info >= (3, 11)
    yield _judge("python", good, found, "install Python 3.11 or newer", needed=True)


def packages() -> Iterator[Finding]:
    for name, least in PACKAGES.items():
        fix = f"pip install '{name}>={least}'"
        version = _version(name)
        good = version is not None and _release(version) >= _release(least)
        yield _judge(name, good, version or "not installed", fix, needed=True)


def accelerators() -> Iterator[Finding]:
    """GPUs, the torch build that fits them, triton, and the collectives over them."""
    try:
        import torch
    except (ImportError, OSError):  # `packages` has said that it is not there
        return
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    driver = Path("/dev/nvidiactl").exists() or shutil.which("nvidia-smi") is not None
    if driver and not gpus:
        fix = (
            f"a driver is here, but torch is a {build} build that finds no GPU: install CUDA torch"
        )
        yield Finding("GPU", "weak", "none usable", fix)
    elif gpus:
        yield Finding("GPU", "ok", f"{gpus} x {torch.cuda.get_device_name()}")
    else:
        yield Finding("GPU", "ok", "none: CPU actors over gloo")
    yield Finding("torch build", "ok", build)
    triton = _version("triton")
    yield _judge("triton", bool(triton) or not gpus, triton or "none", "pip install 'triton>=3.6'")
    gloo, nccl = _collectives()
    yield _judge("gloo", gloo, _yes(gloo), "install a torch built with gloo", needed=True)
    nccl_fix = "install CUDA torch, which brings NCCL"
    yield _judge("NCCL", nccl or gpus < 2, _yes(nccl) if gpus else "not needed", nccl_fix)


def cores() -> Iterator[Finding]:
    have = _cores()
    fix = "set cluster.cpus_per_actor to 0.5 so that two actors fit; slower"
    yield _judge("CPU cores", have >= 2, f"{have:g}", fix)


def memory() -> Iterator[Finding]:
    have = _memory()
    fix = "free memory, or lower cluster.actors: an actor takes about 0.7 GiB, Ray 1 GiB"
    yield _judge("memory", have >= 4 * _GIB, f"{have / _GIB:.1f} GiB available", fix)


def shared_memory() -> Iterator[Finding]:
    folder = Path("/dev/shm")
    have = shutil.disk_usage(folder).free if folder.is_dir() else 0
    fix = "Ray falls back to slow files; in a container: docker run --shm-size=1g"
    yield _judge("/dev/shm", have >= _GIB // 4, f"{have / _GIB:.1f} GiB free", fix)


def disk() -> Iterator[Finding]:
    for name, folder in (("disk here", Path.cwd()), ("disk for Ray", Path(tempfile.gettempdir()))):
        if not os.access(folder, os.W_OK):
            fix = f"make {folder} writable, or set run.dir (here) or TMPDIR (Ray)"
            yield Finding(name, "missing", f"{folder} is read-only", fix)
            continue
        have = shutil.disk_usage(folder).free
        fix = f"free space in {folder}: a checkpoint takes 12 bytes a parameter"
        yield _judge(name, have >= 2 * _GIB, f"{have / _GIB:.1f} GiB free in {folder}", fix)


def open_files() -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = soft == resource.RLIM_INFINITY
    found = "unlimited" if unlimited else f"{soft:,}"
    ask = 65536 if hard == resource.RLIM_INFINITY else min(65536, hard)
    yield _judge("open files", unlimited or soft >= 4096, found, f"ulimit -n {ask}")


def loopback() -> Iterator[Finding]:
    """Ranks and Ray meet over TCP on this machine."""
    try:
        with (
            socket.create_server(("127.0.0.1", 0)) as server,
            socket.create_connection(server.getsockname(), timeout=2),
        ):
            server.accept()[0].close()
    except OSError as error:
        fix = "bring the loopback interface up: ip link set lo up"
        yield Finding("loopback", "missing", f"127.0.0.1: {error.strerror or error}", fix)
        return
    yield Finding("loopback", "ok", "127.0.0.1 answers")


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    python,
    packages,
    accelerators,
    cores,
    memory,
    shared_memory,
    disk,
    open_files,
    loopback,
)


def _judge(name: str, good: bool, found: str, fix: str, *, needed: bool = False) -> Finding:
    if good:
        return Finding(name, "ok", found)
    return Finding(name, "missing" if needed else "weak", found, fix)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _release(version: str) -> tuple[int, ...]:
    """(2, 13, 0) of "2.13.0+cpu"."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()


def _collectives() -> tuple[bool, bool]:
    """Whether torch has gloo and NCCL."""
    import torch

    there = torch.distributed.is_available()
    return (
        there and torch.distributed.is_gloo_available(),
        there and torch.distributed.is_nccl_available(),
    )


def _yes(there: bool) -> str:
    return "there" if there else "not in this torch"


def _cores() -> float:
    """Cores this process may use: its affinity mask, and the quota of its container."""
    mask = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quota, _, period = (_read("/sys/fs/cgroup/cpu.max") or "max").partition(" ")
    limit = float("inf") if quota == "max" else int(quota) / int(period)
    return min(mask or 1, limit)


def _memory() -> int:
    """Bytes that could be taken now, as far as the kernel and the container say."""
    found = re.search(r"MemAvailable:\s+(\d+) kB", _read("/proc/meminfo") or "")
    free = (
        int(found[1]) << 10 if found else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    )
    limit = _read("/sys/fs/cgroup/memory.max") or "max"
    used = _read("/sys/fs/cgroup/memory.current") or "0"
    return free if limit == "max" else min(free, int(limit) - int(used))


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None
