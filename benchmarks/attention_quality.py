"""Routed attention on text, at equal steps: enwik8 at a context of 4096 bytes, beside controls.

    python -m benchmarks.attention_quality --data enwik8.xz --save --seconds 200 --device cuda

A causal model of bytes; who attends to what is said in `benchmarks.attention_controls`. Equal
steps, batches and seeds for all; the first quarter of the steps is dense, but for `linear`. Bits
per byte of held-out rows. Each seed is saved when it is done, all rows of the first seed before the
second; a later run goes on. `benchmarks.attention_table` shows them.
"""

import argparse
import lzma
import math
import time
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import by_seed
from benchmarks.attention_controls import NAMES, make_model
from benchmarks.attention_learner import DENSE, Learner
from benchmarks.results import Row, provenance
from benchmarks.timing import Deadline
from moe_router import Context, Ledger

SIZES = {"layers": 4, "dim": 256, "heads": 4, "kv_heads": 2, "hidden": 512}
BLOCK, NEAR, VOCAB, WARMUP, LR = 64, 2, 256, 50, 2e-3
FILE = "attention_quality"


class Text:
    """Bytes of a file: the last tenth is held out.

    Args:
        path: plain, or packed by xz.
        limit: bytes to read.
    """

    def __init__(self, path: Path, limit: int, rows: int, length: int) -> None:
        with lzma.open(path) if path.suffix == ".xz" else path.open("rb") as file:
            data = torch.frombuffer(bytearray(file.read(limit)), dtype=torch.uint8)
        cut = len(data) * 9 // 10
        self.train, self.held = data[:cut], data[cut:]
        self.rows, self.length = rows, length

    def batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Rows from anywhere in the training part."""
        first_R = torch.randint(len(self.train) - self.length, (self.rows,), generator=generator)
        return self._rows(self.train, first_R)

    def held_out(self, step: int) -> tuple[Tensor, Tensor]:
        """Rows one after another of what is held out."""
        first_R = (step * self.rows + torch.arange(self.rows)) * self.length
        return self._rows(self.held, first_R)

    def _rows(self, data: Tensor, first_R: Tensor) -> tuple[Tensor, Tensor]:
        at_RN = first_R[:, None] + torch.arange(self.length + 1)
        bytes_RN = data[at_RN].long()
        return bytes_RN[:, :-1], bytes_RN[:, 1:]


def quality(text: Text, name: str, seed: int, steps: int, batches: int, device: str) -> Row:
    """Held-out bits per byte, and what share of the causal pairs attention has computed."""
    model = make_model(name, SIZES, text.length, BLOCK, NEAR, VOCAB, seed)
    learner = Learner(model, text.rows, text.length, lr=LR, device=torch.device(device))
    generator = torch.Generator().manual_seed(seed)
    began = time.perf_counter()
    learner.train(lambda _: text.batch(generator), steps, WARMUP, steps // DENSE)
    trained = time.perf_counter() - began
    loss, _ = learner.held_out(batches, text.held_out)
    return {
        "value": loss / math.log(2), "seconds": round(trained, 1),
        "share_of_flops": _share(learner, name),
    }  # fmt: skip


@torch.no_grad()
def _share(learner: Learner, name: str) -> float | None:
    """Of the dense model's FLOPs of attention, projections included; by the Ledger."""
    if name in ("dense", "linear"):  # nothing is routed
        return None
    ledger = Ledger()
    ids_T = learner.ids_RN.flatten()
    context = Context(ledger=ledger)
    learner.model(ids_T, learner.position_T, learner.packing, context=context)
    executed, dense = ledger.by_op()["attention"]
    return round(executed / dense, 4)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="enwik8, plain or packed by xz")
    parser.add_argument("--limit", type=int, default=20_000_000, help="bytes of it to read")
    parser.add_argument("--tokens", type=int, default=4096, help="of a row")
    parser.add_argument("--batch", type=int, default=4, help="rows of a step")
    parser.add_argument("--held-out", type=int, default=32, help="batches of the evaluation")
    by_seed.add_arguments(parser, NAMES)
    args = parser.parse_args(arguments)
    origin, deadline = provenance(args.device), Deadline(args.seconds)
    rows = by_seed.saved(FILE, origin["device"])
    text = Text(args.data, args.limit, args.batch, args.tokens)
    setting = {"steps": args.steps, "batch": args.batch, "tokens": args.tokens}
    setting |= {"limit": args.limit, "unit": "bits per byte"}
    names = [f"enwik8/{name}" for name in args.only.split(";")]
    for name, seed in by_seed.missing(names, args.seeds, rows, setting):
        if deadline.over():
            return
        how = (args.steps, args.held_out, args.device)
        found = quality(text, name.partition("/")[2], seed, *how)
        value = found.pop("value")
        print(f"{name}, seed {seed}: {value:.4f} bits per byte, {found}", flush=True)
        if args.save:
            by_seed.add(FILE, rows, name, seed, value, found | origin, setting)


if __name__ == "__main__":
    main()
