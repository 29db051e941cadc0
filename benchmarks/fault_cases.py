"""Which faults there are, and the run that each of them hits."""

import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moe_router.config import Config
from moe_router.config_file import config_from_dict

STEP, STEPS = 7, 12  # the fault comes when so many steps are committed, of so many
CHECKPOINT_EVERY = 5
SILENT_S = 4.0  # cluster.timeout_s of rows with a frozen rank: what detecting it takes

POINTS = (
    "before counts",
    "mid-dispatch",
    "before combine",
    "in backward",
    "in the optimizer step",
    "while experts move",
    "in a placement commit",
    "in a checkpoint write",
)


@dataclass(frozen=True, slots=True)
class Fault:
    """Attributes:
    point: of POINTS; of the gating service and the driver, how they are called.
    ranks: that strike; empty for none.
    replicate_every: of the run.
    victim: whose processes get the signal.
    """

    name: str
    point: str
    how: signal.Signals
    ranks: tuple[int, ...]
    replicate_every: int = 0
    victim: Literal["ranks", "gating service", "driver", "node"] = "ranks"

    @property
    def moves(self) -> bool:
        """Whether experts move in the run."""
        return self.point == "while experts move"


def faults(ranks: int) -> list[Fault]:
    """Every row of a number of ranks."""
    last = (ranks - 1,)
    kill, stop = signal.SIGKILL, signal.SIGSTOP
    found = [
        Fault(f"{how.name}/{point}/W{ranks}", point, how, last)
        for point in POINTS
        for how in (kill, stop)
    ]
    everyone, point = tuple(range(ranks)), "before combine"
    if ranks > 2:
        found.append(Fault(f"SIGKILL/two at once/W{ranks}", point, kill, everyone[:2]))
    found += [
        Fault(f"SIGKILL/every rank/W{ranks}", point, kill, everyone),
        Fault(f"SIGKILL/every rank, replicas/W{ranks}", point, kill, everyone, 3),
    ]
    if ranks == 2:  # each node is a Ray of its own
        found.append(Fault(f"SIGKILL/node/W{ranks}", point, kill, last, victim="node"))
    for victim in ("gating service", "driver"):
        found.append(Fault(f"SIGKILL/{victim}/W{ranks}", victim, kill, (), victim=victim))
    return found


def config_of(
    folder: Path, name: str, ranks: int, fault: Fault | None = None, device: str = "cpu"
) -> Config:
    """A model so small that a step takes milliseconds."""
    frozen = fault is not None and fault.how == signal.SIGSTOP
    moves = fault is not None and fault.moves
    return config_from_dict(
        {
            "run": {"name": name, "dir": str(folder), "seed": 3},
            "data": {"source": "pydoc", "seq_len": 32},
            "model": {
                "layers": 2, "dim": 32, "heads": 2, "kv_heads": 1, "hidden": 64,
                "moe": {"experts": 4, "top_k": 2, "hidden": 32},
            },
            "train": {
                "steps": STEPS, "batch": 4, "warmup": 2, "eval_rows": 4,
                "checkpoint_every": CHECKPOINT_EVERY,
            },
            "cluster": {
                "actors": ranks, "device": device, "cpus_per_actor": 0.25,
                "timeout_s": SILENT_S if frozen else 30.0,
                "replicate_every": 0 if fault is None else fault.replicate_every,
                # they move once, so what a clock says of it changes nothing
                "rebalance": {"every": STEP, "spare": 1} if moves else None,
            },
            "serve": {"max_new_tokens": 8},
        }
    )  # fmt: skip


def clean_name(fault: Fault, ranks: int) -> str:
    """Of the uninterrupted run that a row is compared with."""
    return f"clean-W{ranks}{'-moves' * fault.moves}"
