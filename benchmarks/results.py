"""Where measurements are kept: `benchmarks/results/NAME.json`, one row per (name, device)."""

import datetime
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent
Row = dict[str, Any]


def provenance(device: str) -> Row:
    """What every row must say about where it comes from."""
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {_cpu()}"
    return {
        "device": name,
        "torch": torch.__version__,
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
    }


def save(name: str, rows: list[Row]) -> Path:
    """Write rows, replacing those of equal (name, device)."""
    path = ROOT / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    old = json.loads(path.read_text()) if path.exists() else []
    fresh = {(row["name"], row["device"]) for row in rows}
    kept = [row for row in old if (row["name"], row["device"]) not in fresh]
    path.write_text(json.dumps(kept + rows, indent=1) + "\n")
    return path


def saved(name: str, origin: Row) -> set[str]:
    """Names of the rows that this commit has saved on this device.

    Args:
        origin: what `provenance` says.
    """
    path = ROOT / "results" / f"{name}.json"
    rows: list[Row] = json.loads(path.read_text()) if path.exists() else []
    same = ("device", "commit")
    return {row["name"] for row in rows if all(row[key] == origin[key] for key in same)}


def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(models)} x {models[0]}" if models else "unknown"


def _commit() -> str:
    """What COMMIT says; else the short commit, with + if the tree has changes but for results."""
    if "COMMIT" in os.environ:
        return os.environ["COMMIT"]
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    if head.returncode != 0:
        return "unknown"
    but = [":/", ":(top,exclude)benchmarks/results"]
    changed = subprocess.run(
        [*git, "status", "--porcelain", "-uno", "--", *but], capture_output=True, text=True
    )
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")
