"""A training on one rank and on several, equally many tokens on each: tokens per second, and MFU.

    python -m benchmarks.train [--config configs/gpu.yaml] [--ranks 2] [--seconds 300] [--save]

Ranks are processes that this one starts, one for each GPU over NCCL, else on the CPU over gloo:
the loop that Ray's actors run, without Ray. `train/2_over_1` is tokens per second of two ranks over
those of one, by the fastest transport; a transport that fails has its reason in the row. A step is
timed on the host and waits for the GPU, because it reads its loss. Beside the one rank, the same
model in transformers with `grouped_mm`: `train_peer.py`; with `--ranks 1` these two alone.
"""

import argparse
import faulthandler
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessException

from benchmarks.dispatch import why
from benchmarks.results import Row, provenance, save
from benchmarks.train_peer import WEIGHTS, measure_peer, name_of, peak_bytes
from moe_router.config import Config
from moe_router.config_file import config_from_dict, config_to_dict, load_config, override
from moe_router.cost import cost, peak_flops
from moe_router.dispatch.ranks import local_device, run_here
from moe_router.dispatch.transports import NAMES

WARM_UP = 3  # steps that compile and allocate
RUN_S = 180  # one that takes longer hangs
GOAL = 1.8
PEERS = {name_of(weights): weights for weights in WEIGHTS}


def measure(device: torch.device, config: dict[str, Any], steps: int) -> dict[str, Any]:
    """Seconds of each step after the first ones, on the slowest rank, and the last loss."""
    from moe_router.training.loop import Trainer

    _watch(device)
    where = {"rank": dist.get_rank(), "ranks": dist.get_world_size(), "device": device}
    trainer = Trainer(config_from_dict(config), **where)  # type: ignore[arg-type]
    records = [trainer.train_step() for _ in range(WARM_UP + steps)]
    seconds = torch.tensor([record.seconds for record in records[WARM_UP:]], dtype=torch.float64)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return {
        "seconds": seconds.tolist(), "tokens": records[-1].tokens, "loss": records[-1].loss,
        "repeated": trainer.repeated, "peak_bytes": peak_bytes(device),
    }  # fmt: skip


def measure_beside(
    device: torch.device, config: dict[str, Any], steps: int, weights: str
) -> dict[str, Any]:
    """The same of transformers' model."""
    _watch(device)
    return measure_peer(device, config, steps, WARM_UP, weights)


def _watch(device: torch.device) -> None:
    """What hangs on a GPU hangs for ever."""
    if device.type == "cuda":
        faulthandler.dump_traceback_later(RUN_S, exit=True)


def at(config: Config, ranks: int, transport: str) -> Config:
    """The same run with as many rows on each of so many ranks."""
    rows = config.train.batch // config.cluster.actors
    changes = (f"train.batch={rows * ranks}", f"cluster.actors={ranks}")
    there = (*changes, f"cluster.transport={transport}")
    return config_from_dict(override(config_to_dict(config), there))


def speed(config: Config, said: dict[str, Any], device: str) -> dict[str, Any]:
    """What one run is worth."""
    median = statistics.median(said["seconds"])
    peak = peak_flops(device)
    flops = cost(config).flops_per_step / median / config.cluster.actors
    return {
        "tokens_per_s": round(said["tokens"] / median, 1), "step_ms": round(median * 1e3, 3),
        "p90_ms": round(sorted(said["seconds"])[len(said["seconds"]) * 9 // 10] * 1e3, 3),
        "mfu": round(flops / peak, 4) if peak else None, "loss": round(said["loss"], 4),
        "repeated": said["repeated"], "peak_bytes": said["peak_bytes"],
    }  # fmt: skip


def table(of: dict[str, dict[str, Any]], reasons: dict[str, str], ranks: int) -> list[Row]:
    """Args:
    of: by `alone`, peer and transport, what each run is worth; `reasons` why others are not.
    """
    rows: list[Row] = []
    by = {name: of[name] for name in NAMES if name in of}
    fastest = max(by, key=lambda name: by[name]["tokens_per_s"], default=None)
    for name, found in (("1", of.get("alone")), (str(ranks), by.get(fastest or ""))):
        said = found or {"tokens_per_s": None, "reason": reasons}
        row = {"name": f"train/tokens_per_s/{name}", "value": said["tokens_per_s"]}
        rows.append(row | {"unit": "tokens/s", "ranks": int(name)} | said)
    rows[0] |= _beside(of, reasons, rows[0]["value"])
    if ranks == 1:
        return rows[:1]
    one, several = rows[0]["value"], rows[1]["value"]
    value = round(several / one, 3) if one and several else None
    about = {"unit": "times the tokens/s of one rank, equally many tokens on each", "goal": GOAL}
    row = {"name": f"train/{ranks}_over_1", "value": value, "ceiling": float(ranks)} | about
    row |= {"transport": fastest, "transports": by, "reasons": reasons, "ranks": ranks}
    return [*rows, row]


def _beside(
    of: dict[str, dict[str, Any]], reasons: dict[str, str], value: float | None
) -> dict[str, Any]:
    """The peers on one rank, and our speed over that of the fastest."""
    peers = {name: of.get(name, {"reason": reasons.get(name)}) for name in PEERS}
    ran = [name for name in PEERS if name in of]
    best = max(ran, key=lambda name: float(of[name]["tokens_per_s"]), default=None)
    theirs = of[best]["tokens_per_s"] if best else None
    ratio = round(value / theirs, 3) if value and theirs else None
    return {"peers": peers, "best_peer": best, "peer_value": theirs, "ratio": ratio}


def shown(row: Row) -> str:
    keys = ("mfu", "step_ms", "transport", "best_peer", "peer_value", "ratio", "reasons")
    said = {key: row[key] for key in keys if row.get(key)}
    return f"{row['name']}: {row['value']} {row['unit']} {said}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", default="configs/gpu.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--transports", default=",".join(reversed(NAMES)), help="the first, first")
    parser.add_argument("--steps", type=int, default=10, help="that are timed")
    parser.add_argument("--seconds", type=float, default=600, help="nothing is begun after them")
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args(arguments)
    end = time.monotonic() + args.seconds
    config = load_config(args.config, args.set)
    kind = local_device(args.ranks)
    origin = provenance(kind)
    of: dict[str, dict[str, Any]] = {}
    reasons: dict[str, str] = {}
    transports = args.transports.split(",") if args.ranks > 1 else []
    for name in ("alone", *PEERS, *transports):
        if time.monotonic() > end:
            reasons[name] = "no time left"
            continue
        ours = at(config, args.ranks, name) if name in NAMES else at(config, 1, "all_to_all")
        try:
            how = (config_to_dict(ours), args.steps)
            if name in PEERS:
                said = run_here(1, kind, measure_beside, *how, PEERS[name])
            else:
                said = run_here(ours.cluster.actors, kind, measure, *how)
        except ProcessException as problem:
            reasons[name] = why(problem)
            print(f"{name}: {reasons[name]}", flush=True)
            continue
        of[name] = speed(ours, said, origin["device"])
        print(f"{name}: {of[name]}", flush=True)
        if args.save:  # what is known so far; the last one stays
            save("train", [row | origin for row in table(of, reasons, args.ranks)])
    rows = [row | origin for row in table(of, reasons, args.ranks)]
    print("\n".join(map(shown, rows)), flush=True)
    if args.save:
        save("train", rows)


if __name__ == "__main__":
    main()
