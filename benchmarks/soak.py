"""A served model under more load than it bears, while everything goes wrong.

    python -m benchmarks.soak [--minutes 10] [--load 1.2] [--save]

`moe-router serve` over Ray Serve, two shards on CPUs, a small model with experts. First patient
clients measure its capacity, then clients arrive at random at `--load` times that, most of them
patient, some slow readers, some that vanish, some with malformed bodies. After a quarter of the
time a shard is SIGKILLed, in the middle the application is deployed again.

`value` is the share of requests that were answered, or refused with a reason, of those whose
client stayed; it must be 1. Every answer is compared with the text of `generate`: `wrong` must be
0. `memory_mb` is the resident memory of all processes of the server that is no file's, the medians
of five equal parts of the time; from five minutes on, the last may be at most a tenth above the
fourth. Without a GPU.
"""

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.contest import tell
from benchmarks.results import Row, provenance, save
from benchmarks.soak_clients import Outcome, Question, capacity, load
from benchmarks.soak_server import Server
from moe_router.config_file import config_from_dict
from moe_router.models import Sampling, generate
from moe_router.training.inference import load_for_inference
from moe_router.training.loop import Trainer
from moe_router_cluster.run_folder import open_run

CONFIG = {
    "data": {"source": "pydoc", "seq_len": 64},
    "model": {
        "layers": 2, "dim": 64, "heads": 4, "kv_heads": 2, "hidden": 128,
        "moe": {"experts": 8, "top_k": 2, "hidden": 64},
    },
    "train": {"steps": 20, "batch": 8, "warmup": 2, "eval_rows": 8},
    "cluster": {"actors": 1, "device": "cpu"},
}  # fmt: skip
PROMPTS = ["The ", "A function that ", "import ", "Return the ", "x"]
CALIBRATE_S = 20.0
GROWTH = 1.1
SETTLED_S = 300.0


def make_run(folder: Path) -> Path:
    """Train a few steps; returns the run."""
    config = config_from_dict(CONFIG | {"run": {"name": "soak", "dir": str(folder)}}, "soak")
    with open_run(config, restart=False) as run:
        trainer = Trainer(config, run_dir=run.path)
        for _ in range(config.train.steps):
            trainer.train_step()
        trainer.save(run.path, wait=True)
        return run.path


def questions_of(run: Path) -> list[Question]:
    """With the answers."""
    (step,) = run.glob("step_*")
    model, _, tokenizer = load_for_inference(step)
    stop, found = tokenizer.document_id, []
    for seed in range(40):
        prompt, new = PROMPTS[seed % len(PROMPTS)], 4 + 7 * (seed % 9)
        sampling = Sampling(max_new_tokens=new, temperature=0.8, seed=seed)
        (made,) = generate(model, [[stop, *tokenizer.encode(prompt)]], sampling, stop_id=stop)
        found.append(Question(prompt, new, seed, tokenizer.decode(made)))
    return found


async def watch(server: Server, samples: list[tuple[float, float]]) -> None:
    """Memory, again and again."""
    began = time.perf_counter()
    while True:
        used = await asyncio.to_thread(server.memory_mb)
        samples.append((time.perf_counter() - began, used))
        await asyncio.sleep(2.0)


async def disturb(server: Server, seconds: float) -> list[str]:
    """What goes wrong on the side of the server, and how it came out."""
    await asyncio.sleep(seconds / 4)
    tell("a shard is killed")
    await asyncio.to_thread(server.kill_a_shard)
    await asyncio.sleep(seconds / 4)
    tell("it is deployed again")
    failed = await asyncio.to_thread(server.redeploy)
    tell(f"deployed again{': ' if failed else ''}{failed}")
    return [failed] if failed else []


async def soak(server: Server, questions: Sequence[Question], seconds: float, factor: float) -> Row:
    tell("capacity")
    await capacity(server.address, questions, CALIBRATE_S / 4)  # warms it up
    able = await capacity(server.address, questions, CALIBRATE_S)
    tell(f"{able:.1f} answers/s; {factor:g} times that for {seconds:g} s")
    samples: list[tuple[float, float]] = []
    watching = asyncio.create_task(watch(server, samples))
    disturbing = asyncio.create_task(disturb(server, seconds))
    outcomes = await load(server.address, questions, factor * able, seconds)
    failures = await disturbing
    watching.cancel()
    return summary(outcomes, samples, seconds) | {
        "capacity": round(able, 2), "load": factor, "seconds": seconds, "failures": failures,
    }  # fmt: skip


def summary(
    outcomes: Sequence[Outcome], samples: Sequence[tuple[float, float]], seconds: float
) -> Row:
    kinds: Counter[str] = Counter(outcome.kind for outcome in outcomes)
    stayed = len(outcomes) - kinds["vanished"]
    answered = [o for o in outcomes if o.kind == "answered"]
    patient = [o for o in answered if o.way != "slow"]
    parts = [[mb for at, mb in samples if i <= 5 * at / seconds < i + 1] for i in range(5)]
    memory = [round(statistics.median(part), 1) for part in parts if part]
    good = kinds["answered"] + kinds["refused"]
    settled = seconds >= SETTLED_S and len(memory) == 5  # sooner, processes are still made
    flat = memory[4] <= GROWTH * memory[3] if settled else None
    told = Counter(f"{o.status}: {o.reason[:90]}" for o in outcomes if o.kind == "refused")
    bad = Counter(f"{o.way}: {o.reason[:160]}" for o in outcomes if o.kind in ("lost", "wrong"))
    return {
        "value": round(good / stayed, 6) if stayed else None, "unit": "share",
        "asked": len(outcomes), **kinds, "wrong": kinds["wrong"], "lost": kinds["lost"],
        "first_s": _quantiles([o.first_s for o in patient]),
        "total_s": _quantiles([o.total_s for o in patient]),
        "refusals": dict(told.most_common(12)), "losses": dict(bad.most_common(12)),
        "memory_mb": memory, "flat": flat,
        "correct": kinds["wrong"] == kinds["lost"] == 0 and flat is not False and bool(answered),
    }  # fmt: skip


def _quantiles(values: list[float]) -> dict[str, float]:
    """p50, p90, p99 and the greatest, seconds."""
    ordered = sorted(values) or [0.0]
    at = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    last = len(ordered) - 1
    return {name: round(ordered[min(last, int(q * len(ordered)))], 3) for name, q in at.items()}


def run_soak(minutes: float, factor: float) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        tell("trains a small model")
        run = make_run(Path(folder))
        questions = questions_of(run)
        tell("serves it")
        with Server(run, actors=2) as server:
            row = asyncio.run(soak(server, questions, minutes * 60, factor))
    return {"name": f"soak/minutes{minutes:g}"} | row


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--load", type=float, default=1.2, help="times the capacity")
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    origin: dict[str, Any] = provenance("cpu")
    row = run_soak(args.minutes, args.load)
    for key, value in row.items():
        print(f"{key:12} {value}", flush=True)
    if args.save:
        save("soak", [row | origin])
    sys.exit(0 if row["correct"] else 1)


if __name__ == "__main__":
    main()
