"""A training on one rank and on several, equally many tokens on each: tokens per second, and MFU.

    python -m benchmarks.train [--config configs/gpu.yaml] [--ranks 2] [--seconds 300] [--save]

Ranks are processes that this one starts, one for each GPU over NCCL, else on the CPU over gloo:
the loop that Ray's actors run, without Ray. `train/2_over_1` is tokens per second of two ranks over
those of one, by the fastest transport; a transport that fails has its reason in the row. A step is
timed on the host and waits for the GPU, because it reads its loss.
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
from moe_router.config import Config
from moe_router.config_file import config_from_dict, config_to_dict, load_config, override
from moe_router.cost import cost, peak_flops
from moe_router.dispatch.ranks import local_device, run_here
from moe_router.dispatch.transports import NAMES

WARM_UP = 3  # steps that compile and allocate
RUN_S = 180  # one that takes longer hangs
GOAL = 1.8


def measure(device: torch.device, config: dict[str, Any], steps: int) -> dict[str, Any]:
    """Seconds of each step after the first ones, on the slowest rank, and the last loss."""
    from moe_router.training.loop import Trainer

    if device.type == "cuda":
        faulthandler.dump_traceback_later(RUN_S, exit=True)
        torch.cuda.reset_peak_memory_stats(device)
    where = {"rank": dist.get_rank(), "ranks": dist.get_world_size(), "device": device}
    trainer = Trainer(config_from_dict(config), **where)  # type: ignore[arg-type]
    records = [trainer.train_step() for _ in range(WARM_UP + steps)]
    seconds = torch.tensor([record.seconds for record in records[WARM_UP:]], dtype=torch.float64)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return {
        "seconds": seconds.tolist(), "tokens": records[-1].tokens, "loss": records[-1].loss,
        "repeated": trainer.repeated, "peak_bytes": peak,
    }  # fmt: skip


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
    of: by `alone` and transport, what each run is worth; `reasons` why others are worth nothing.
    """
    rows: list[Row] = []
    by = {name: found for name, found in of.items() if name != "alone"}
    fastest = max(by, key=lambda name: by[name]["tokens_per_s"], default=None)
    for name, found in (("1", of.get("alone")), (str(ranks), by.get(fastest or ""))):
        said = found or {"tokens_per_s": None, "reason": reasons}
        row = {"name": f"train/tokens_per_s/{name}", "value": said["tokens_per_s"]}
        rows.append(row | {"unit": "tokens/s", "ranks": int(name)} | said)
    one, several = rows[0]["value"], rows[1]["value"]
    value = round(several / one, 3) if one and several else None
    about = {"unit": "times the tokens/s of one rank, equally many tokens on each", "goal": GOAL}
    row = {"name": f"train/{ranks}_over_1", "value": value, "ceiling": float(ranks)} | about
    row |= {"transport": fastest, "transports": by, "reasons": reasons, "ranks": ranks}
    return [*rows, row]


def shown(row: Row) -> str:
    said = {key: row[key] for key in ("mfu", "step_ms", "transport", "reasons") if row.get(key)}
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
    for name in ("alone", *args.transports.split(",")):
        if time.monotonic() > end:
            reasons[name] = "no time left"
            continue
        ours = at(config, 1, "all_to_all") if name == "alone" else at(config, args.ranks, name)
        try:
            how = (config_to_dict(ours), args.steps)
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
