"""Associative recall at 2k and 8k tokens: does choosing blocks by content beat chance?

    python -m benchmarks.attention_recall --save --seconds 200 --device cuda

A row is n / 2 random tokens, and then the same again, cut into passages of 128 tokens whose order
is random: where a passage comes from is known by its content alone. What counts is the accuracy in
the second half but for the first four tokens of a passage, by which it is recognised. Two layers;
who attends to what is said in `benchmarks.attention_controls`. Equal steps, batches and seeds for
all. The first half of the steps is dense, but for `linear`, and of rows of 256 tokens in passages
of 32: there the token to look up is one of 128, and a model finds the way in a fraction of the
steps. Each seed is saved when it is done; a later run goes on.
"""

import argparse
import dataclasses
import time

import torch
from torch import Tensor

from benchmarks import by_seed
from benchmarks.attention_controls import NAMES, make_model
from benchmarks.attention_learner import NONE, Learner
from benchmarks.results import provenance
from benchmarks.timing import Deadline

SIZES = {"layers": 2, "dim": 128, "heads": 4, "kv_heads": 2, "hidden": 256}
BLOCK, NEAR, CUE, WARMUP, LR = 16, 1, 4, 50, 1.5e-3
SHORT, SHORT_PASSAGE = 256, 32  # tokens
FILE = "attention_quality"


@dataclasses.dataclass(frozen=True)
class Task:
    """Attributes:
    tokens: of a row.
    rows: of a batch.
    passage: tokens of one.
    vocab: of random tokens.
    """

    tokens: int
    rows: int
    passage: int
    vocab: int

    def batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(R, n) ids, and what is wanted after each."""
        half = self.tokens // 2
        first = torch.randint(self.vocab, (self.rows, half), generator=generator)
        passages = first.view(self.rows, -1, self.passage)
        order = torch.rand(passages.shape[:2], generator=generator).argsort(-1)
        second = passages.gather(1, order[..., None].expand_as(passages)).flatten(1)
        ids = torch.cat([first, second], 1)
        target = torch.full_like(ids, NONE)
        target[:, half:-1] = ids[:, half + 1 :]
        inside = (torch.arange(self.tokens) + 1) % self.passage
        return ids, target.masked_fill(inside < CUE, NONE)


def recall(task: Task, name: str, seed: int, steps: int, device: str) -> float:
    """Accuracy on held-out rows after training."""
    model = make_model(name, SIZES, task.tokens, BLOCK, NEAR, task.vocab, seed)
    generator = torch.Generator().manual_seed(seed)

    def teach(task: Task, steps: int, dense: int) -> Learner:
        where = torch.device(device)
        learner = Learner(model, task.rows, task.tokens, lr=LR, device=where)
        learner.train(lambda _: task.batch(generator), steps, WARMUP, dense)
        return learner

    short = min(SHORT, task.tokens)
    easy = Task(short, task.rows * task.tokens // short, SHORT_PASSAGE, task.vocab)
    teach(easy, steps // 2, steps // 2)
    learner = teach(task, steps - steps // 2, 0)
    return learner.held_out(4, lambda _: task.batch(generator))[1]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", default="2048,8192", help="lengths, by commas")
    parser.add_argument("--batch", type=int, default=32768, help="tokens of a batch")
    parser.add_argument("--passage", type=int, default=128, help="tokens of a passage")
    by_seed.add_arguments(parser, NAMES)
    args = parser.parse_args(arguments)
    origin, deadline = provenance(args.device), Deadline(args.seconds)
    rows = by_seed.saved(FILE, origin["device"])
    for tokens in map(int, args.tokens.split(",")):
        # a token comes about twice in the first half, whatever its length
        task = Task(tokens, max(1, args.batch // tokens), args.passage, tokens // 4)
        setting = dataclasses.asdict(task) | {"steps": args.steps, "unit": "accuracy"}
        setting["short"] = SHORT
        names = [f"recall/T{tokens}/{name}" for name in args.only.split(";")]
        for name, seed in by_seed.missing(names, args.seeds, rows, setting):
            if deadline.over():
                return
            began = time.perf_counter()
            value = recall(task, name.rpartition("/")[2], seed, args.steps, args.device)
            took = round(time.perf_counter() - began, 1)
            print(f"{name}, seed {seed}: {value:.4f} in {took} s", flush=True)
            if args.save:
                about = {"seconds": took, "chance": round(1 / task.vocab, 4)} | origin
                by_seed.add(FILE, rows, name, seed, value, about, setting)


if __name__ == "__main__":
    main()
