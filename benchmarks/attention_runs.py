"""Single runs of the attention benchmark: what is run, how long it took, what it took of memory."""

import time

import torch

from benchmarks.attention_cases import Case
from benchmarks.results import Row
from benchmarks.timing import Run


def pass_of(case: Case, way: str, attend: Run) -> Run:
    if way == "forward":
        return torch.no_grad()(attend)
    return lambda: case.backward(attend())


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(run: Run, device: torch.device) -> float:
    wait(device)
    began = time.perf_counter()
    run()
    wait(device)
    return time.perf_counter() - began


def shown(row: Row) -> str:
    if row["value"] is None:
        return f"{row['name']}: {row['reason']}"
    text = f"{row['name']}: {row['value']} {row['unit']}"
    if "peers" not in row:
        beside = f", {row['best_peer']} {row['peer_value']}" if "best_peer" in row else ""
        return f"{text} {row.get('cut', '')}{beside}"
    peers = ", ".join(f"{n} {e.get('value') or e['reason']}" for n, e in row["peers"].items())
    return (
        f"{text}, {row['tflops']} TFLOP/s, selection {row['selection_us']} us, share "
        f"{row['share']}, peak {row['peak_mib']} MiB, ratio {row['ratio']} (goal {row['goal']}) "
        f"| {peers}"
    )
