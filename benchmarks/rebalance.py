"""Step time under skewed routing, before experts have moved and after.

    python -m benchmarks.rebalance [--only PATTERN] [--save]

Two trainings of the same model take turns on two ranks of this machine (gloo on CPUs, NCCL where
there are two GPUs), on the same batches: one leaves its experts where they are, the other has
`cluster.rebalance` with a spare slot on each rank. A score bias gives one expert its share of the
tokens. `correct`: every loss of the two is equal to rtol 1e-5. What counts is the steps between the
first look and the second; the learning rate is next to nothing, so that the skew stays.
"""

import argparse
import fnmatch
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.results import Row, provenance, save
from moe_router.config import Config
from moe_router.config_file import config_from_dict
from moe_router.dispatch.ranks import local_device, run_here
from moe_router.layers.moe import MoE
from moe_router.observability.records import StepRecord
from moe_router.placement import Placement
from moe_router.routing import Context
from moe_router.training.loop import Trainer
from moe_router.training.parallel import moe_layers
from moe_router_kernels import reference

RANKS, EXPERTS, HOT = 2, 8, 3
EVERY, TURN = 24, 6  # steps between looks, and of one training before it is the other's turn
CASES = {"K1/hot40": (1, 0.4), "K2/hot40": (2, 0.4), "K2/as born": (2, None)}
_TURNS = 60  # of setting the bias


def config_of(top_k: int, device: str, *, moving: bool) -> Config:
    """Experts wide enough to be most of a step."""
    small = device == "cpu"
    return config_from_dict(
        {
            "run": {"name": "rebalance", "seed": 3},
            "data": {"source": "pydoc", "seq_len": 128 if small else 1024},
            "model": {
                "layers": 1, "dim": 256 if small else 2048, "heads": 4, "kv_heads": 2,
                "hidden": 256,
                "moe": {
                    "experts": EXPERTS, "top_k": top_k, "hidden": 1024 if small else 4096,
                    "renormalise": top_k > 1, "bias_rate": 1e-9, "balance_loss": 0.0,
                },
            },
            "train": {
                "steps": 10_000, "batch": 48 if small else 16, "lr": 1e-9,
                "precision": "fp32" if small else "bf16",
            },
            "cluster": {
                "actors": RANKS,
                "rebalance": {"every": EVERY, "spare": 1} if moving else None,
            },
        }
    )  # fmt: skip


def lean(trainer: Trainer, share: float) -> None:
    """Bias the routers until HOT has this share of the tokens, and the others have as much each."""
    layers = moe_layers(trainer.model)
    top_k = layers[0].config.top_k
    want_E = torch.full((EXPERTS,), (top_k - share) / (EXPERTS - 1), device=trainer.device)
    want_E[HOT] = share
    for turn in range(_TURNS):
        for moe, share_E in zip(layers, _shares(trainer, layers), strict=True):
            moe.router.bias_E -= (share_E - want_E) / (10 + turn)  # scores are probabilities


def _shares(trainer: Trainer, layers: list[MoE]) -> torch.Tensor:
    """(L, E): of the tokens of all ranks in the next step, those that choose each expert."""
    micro = trainer._micro(0)
    with torch.no_grad():
        out = trainer._forward(micro.batch, Context(micro.key, step=trainer.step))
    chosen = [routed.choice.target_TK for routed in out.routed if routed is not None]
    counts_LE = torch.stack([reference.count(ids_TK, EXPERTS) for ids_TK in chosen])
    dist.all_reduce(counts_LE)
    return counts_LE / micro.batch.tokens


def measure(device: torch.device, top_k: int, share: float | None) -> dict[str, Any]:
    """Both trainings in turn: seconds of each step, what the looks said, rows of the ranks."""
    where: dict[str, Any] = {"rank": dist.get_rank(), "ranks": RANKS, "device": device}
    stays, moves = (
        Trainer(config_of(top_k, device.type, moving=moving), **where) for moving in (False, True)
    )
    if share is not None:
        lean(stays, share)
        for one, other in zip(moe_layers(moves.model), moe_layers(stays.model), strict=True):
            one.router.bias_E.copy_(other.router.bias_E)
    before, after = _Steps(stays), _Steps(moves)
    for _ in range(2 * EVERY // TURN):
        before.take(TURN)
        after.take(TURN)
        if len(after.records) == EVERY:
            placed = [moe.placement for moe in moe_layers(moves.model)]
    load_LE = before.records[-1].load_LE
    losses = [(a.loss, b.loss) for a, b in zip(before.records, after.records, strict=True)]
    return {
        **before.slowest("before"), **after.slowest("after"), "looks": after.looks,
        "losses": max(abs(a - b) / abs(a) for a, b in losses),
        "share": statistics.mean(_hot(record, top_k) for record in before.records[EVERY:]),
        "max_over_mean": [
            _uneven([moe.placement for moe in moe_layers(stays.model)], load_LE),
            _uneven(placed, load_LE),
        ],
    }  # fmt: skip


class _Steps:
    """The steps of a training, timed by the wall and, on CPUs, by what this process computed:
    other work on the machine is in the first, and hardly in the second."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self.records: list[StepRecord] = []
        self.looks: list[Any] = []
        self._cpu_s: list[float] = []

    def take(self, steps: int) -> None:
        for _ in range(steps):
            began = time.process_time()
            self.records.append(self._trainer.train_step())
            self._cpu_s.append(time.process_time() - began)
            if (look := self._trainer.rebalanced) is not None:
                self.looks.append(look.facts())

    def slowest(self, name: str) -> dict[str, list[float]]:
        """Of each step after the first look, the rank that took longest."""
        wall = [record.seconds for record in self.records]
        both = torch.tensor([wall, self._cpu_s], dtype=torch.float64, device=self._trainer.device)
        dist.all_reduce(both, dist.ReduceOp.MAX)
        wall_s, cpu_s = both[:, EVERY:-1].tolist()  # the last one looks again
        return {name: wall_s, f"{name}_cpu": cpu_s}


def _hot(record: StepRecord, top_k: int) -> float:
    """Share of the tokens that chose HOT."""
    return sum(load_E[HOT] for load_E in record.load_LE) * top_k / sum(map(sum, record.load_LE))


def _uneven(placements: list[Placement], load_LE: list[list[int]]) -> float:
    """Rows of the busiest rank over the mean, all layers."""
    each = zip(placements, load_LE, strict=True)
    worst = sum(max(placement.load_of_ranks(load_E)) for placement, load_E in each)
    return worst * RANKS / sum(map(sum, load_LE))


def row_of(case: str, said: dict[str, Any], kind: str) -> Row:
    before, after = (1e3 * statistics.median(said[name]) for name in ("before", "after"))
    uneven = said["max_over_mean"]
    row: Row = {
        "name": f"rebalance/step/E{EXPERTS}/{case}/W{RANKS}",
        "value": round(after, 1), "unit": "ms", "p90": _p90(said["after"]),
        "before": round(before, 1), "before_p90": _p90(said["before"]),
        "ratio": round(before / after, 3), "hot_share": round(said["share"], 3),
        "rows_max_over_mean": round(uneven[1], 3),
        "rows_max_over_mean_before": round(uneven[0], 3),
        "straggler_us": said["looks"][1]["straggler_us"],
        "straggler_us_before": said["looks"][0]["straggler_us"],
        "moved": said["looks"][0]["slots"], "steps": len(said["after"]),
        "correct": said["losses"] < 1e-5,
    }  # fmt: skip
    if kind == "cpu":
        cpu = [1e3 * statistics.median(said[name]) for name in ("before_cpu", "after_cpu")]
        row |= {"cpu_ms": round(cpu[1], 1), "cpu_ms_before": round(cpu[0], 1)}
        row |= {"cpu_ratio": round(cpu[0] / cpu[1], 3)}
    return row


def _p90(seconds: list[float]) -> float:
    return round(1e3 * sorted(seconds)[len(seconds) * 9 // 10], 1)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="*", help="of cases, such as 'K1/*'")
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args(arguments)
    kind = local_device(RANKS)
    for case, (top_k, share) in CASES.items():
        if not fnmatch.fnmatch(case, args.only):
            continue
        said = run_here(RANKS, kind, measure, top_k, share)
        row = row_of(case, said, kind) | provenance(kind)
        print(row, flush=True)
        if args.save:
            save("rebalance", [row])


if __name__ == "__main__":
    main()
