"""What `moe-router simulate` predicts of a training on several ranks, beside what it then takes.

    python -m benchmarks.simulate [--config configs/gpu.yaml] [--ranks 2] [--topology FILE] [--save]

Ranks are processes that this one starts: one for each GPU over NCCL, else on the CPU over gloo.
In turns: all of them at once, but each for itself, take a step of one rank, and a row through its
experts; the link is measured as the chooser does; they train together by each transport. The first
two are the topology. The routing of one more step is recorded and replayed on it. On CPUs seconds
are of the processor, which others may share: they leave out what a rank waits for another.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml

from benchmarks.results import Row, provenance, save
from benchmarks.train import WARM_UP, at
from moe_router.config import Config
from moe_router.config_file import config_from_dict, config_to_dict, load_config, override
from moe_router.dispatch import Dispatcher
from moe_router.dispatch.link import Clock, slowest
from moe_router.dispatch.link import measure as measure_link
from moe_router.dispatch.ranks import local_device, run_here
from moe_router.layers.moe import MoE
from moe_router.routing.plan import plan_from_ids
from moe_router.simulation import Topology, load_recording, simulate
from moe_router.simulation.topology import FixedConfig, RatesConfig
from moe_router.training.loop import Trainer
from moe_router.training.parallel import moe_layers
from moe_router.training.transport import training_dispatcher
from moe_router.types import Choice

GOAL = 0.15


def measure(
    device: torch.device, config: dict[str, Any], rounds: int, steps: int, folder: str
) -> dict[str, Any]:
    """Everything, on one rank of several; what is recorded lies in folder/routing.

    Args:
        rounds: in which all take turns, so that what else runs on the machine meets all alike.
        steps: of each in a round.
    """
    read, (rank, ranks) = config_from_dict(config), (dist.get_rank(), dist.get_world_size())
    alone = Trainer(at(read, 1, "all_to_all"), device=device)
    clock = clock_of(device)
    links = [measure_link(device, clock=clock)]
    names = list(links[0].fixed_s)
    every = len(names) * (WARM_UP + rounds * steps) + 1
    record = ("run.record=true", f"run.record_every={every}")
    there = config_from_dict(override(config_to_dict(at(read, ranks, names[0])), record))
    together = Trainer(there, rank=rank, ranks=ranks, device=device, run_dir=Path(folder))
    ways = {n: training_dispatcher(at(read, ranks, n), ranks, device, None) for n in names}
    took: dict[str, list[float]] = {name: [] for name in ("alone", "experts", *names)}
    for turn in range(rounds):
        more = WARM_UP if turn == 0 else 0
        links.append(measure_link(device, clock=clock))
        took["alone"] += _steps_s(alone, steps + more, clock)[more:]
        took["experts"].append(_experts_s(moe_layers(alone.model)[0], alone, device))
        for name, way in ways.items():
            _go_by(together, way)
            took[name] += _steps_s(together, steps + more, clock)[more:]
    together.train_step()  # recorded, and not timed
    return {"links": [asdict(link) for link in links], "took_s": took}


def _go_by(trainer: Trainer, way: Dispatcher) -> None:
    for moe in moe_layers(trainer.model):
        moe.dispatcher = way
    trainer.model.dispatcher = way


def clock_of(device: torch.device) -> Clock:
    """On a CPU, seconds of the processor: other processes may share it."""
    return time.perf_counter if device.type == "cuda" else time.process_time


def _steps_s(trainer: Trainer, steps: int, clock: Clock) -> list[float]:
    """Seconds of each step on the slowest rank."""
    seconds = []
    for _ in range(steps):
        began = clock()
        trainer.train_step()  # reads its loss: the device is done
        seconds.append(clock() - began)
    worst = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    slow: list[float] = worst.tolist()
    return slow


def _experts_s(moe: MoE, trainer: Trainer, device: torch.device) -> float:
    """Forward and backward of a micro-step's rows through one layer's experts."""
    config, K = trainer.config, moe.config.top_k
    T = config.train.batch // config.train.accumulation * config.data.seq_len
    drawn_TE = torch.rand(T, moe.config.experts, device=device)
    target_TK = drawn_TE.topk(K).indices.int()
    choice = Choice(target_TK, torch.full((T, K), 1 / K, device=device))
    plan = plan_from_ids(target_TK, moe.config.experts)
    bf16 = config.train.precision == "bf16"
    x_TD = torch.randn(T, moe.dim, device=device, requires_grad=True)

    def run() -> None:
        moe.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            y_TD = moe.experts(x_TD.bfloat16() if bf16 else x_TD, choice, plan)
        y_TD.sum().backward()

    return slowest(run, device, None, 5, clock_of(device))


def topology_of(config: Config, said: dict[str, Any], ranks: int) -> Topology:
    """The machine as it was measured. What is left of a step alone is the rest of any step."""
    moe, model, took = config.model.moe, config.model, said["took_s"]
    assert moe is not None
    tokens = config.train.batch // ranks * config.data.seq_len
    row_s = statistics.median(took["experts"]) / (tokens // config.train.accumulation * moe.top_k)
    layers = sum(model.is_moe(index) for index in range(model.layers))
    rest = statistics.median(took["alone"]) / tokens - layers * moe.top_k * row_s
    rates, fixed_s = (
        {name: statistics.median(link[part][name] for link in said["links"]) for name in names}
        for part, names in said["links"][0].items()
        if part in ("bytes_per_s", "fixed_s")
    )
    return Topology(
        ranks=ranks, rates=RatesConfig(**rates), fixed_s=FixedConfig(**fixed_s),
        expert_row_s=row_s, rest_token_s=max(rest, 0.0), row_bound=config.cluster.row_bound,
    )  # fmt: skip


def table(config: Config, said: dict[str, Any], topology: Topology, folder: Path) -> list[Row]:
    """A row for each transport."""
    (folder / "config.yaml").write_text(yaml.safe_dump(config_to_dict(config)))
    found = simulate(load_recording(folder), topology)
    alone_ms = statistics.median(said["took_s"]["alone"]) * 1e3
    rows = []
    for name, predicted in found.step_s.items():
        took = statistics.median(said["took_s"][name])
        rows.append(
            {
                "name": f"simulate/{name}", "value": round(predicted * 1e3, 3), "unit": "ms",
                "measured": round(took * 1e3, 3), "error": round(predicted / took - 1, 4),
                "goal": GOAL, "ranks": topology.ranks, "dispatch_ms": found.moving_s[name] * 1e3,
                "experts_ms": found.expert_s * 1e3, "gradients_ms": found.gradient_s * 1e3,
                "rest_ms": found.rest_s * 1e3, "alone_ms": alone_ms,
            }
        )  # fmt: skip
    return rows


def shown(row: Row) -> str:
    parts = ", ".join(
        f"{key.removesuffix('_ms')} {row[key]:.2f}"
        for key in ("dispatch_ms", "experts_ms", "gradients_ms", "rest_ms", "alone_ms")
    )
    return (
        f"{row['name']}: predicted {row['value']} ms, measured {row['measured']} ms, error "
        f"{row['error']:+.1%} ({parts})"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", default="configs/gpu.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=4, help="in which all take turns")
    parser.add_argument("--steps", type=int, default=4, help="of each in a round")
    parser.add_argument("--topology", type=Path, help="write the measured one there")
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args(arguments)
    config = at(load_config(args.config, args.set), args.ranks, "all_to_all")
    kind = local_device(args.ranks)
    with tempfile.TemporaryDirectory() as folder:
        given = (config_to_dict(config), args.rounds, args.steps, folder)
        said = run_here(args.ranks, kind, measure, *given)
        topology = topology_of(config, said, args.ranks)
        if args.topology:
            args.topology.write_text(yaml.safe_dump(asdict(topology), sort_keys=False))
        rows = [row | provenance(kind) for row in table(config, said, topology, Path(folder))]
    print("\n".join(map(shown, rows)), flush=True)
    if args.save:
        save("simulate", rows)


if __name__ == "__main__":
    main()
