"""Sentences for `benchmarks.minilm`, and the probe that says what their embeddings hold."""

import csv
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

TAUGHT, FITTED, TESTED = 1000, 600, 300  # sentences of each task: routers, probe, scores
Labelled = list[tuple[str, int]]


@dataclass(frozen=True, slots=True)
class Task:
    """Sentences with labels: that teach routers, that fit a probe, that are tested."""

    taught: Labelled
    fitted: Labelled
    tested: Labelled


def read(data: Path) -> dict[str, Task]:
    """SST-2 (sentences) and Banking77, shuffled the same way each time."""

    def banking(part: str) -> Labelled:
        with (data / f"banking77/{part}.csv").open(encoding="utf-8", newline="") as file:
            rows = [(row["text"], row["category"]) for row in csv.DictReader(file)]
        names = sorted({name for _, name in rows})
        return [(text, names.index(name)) for text, name in rows]

    return {
        name: _task(load("train"), load("test"))
        for name, load in (("sst2", partial(sst2, data / "sst2")), ("banking77", banking))
    }


def sst2(folder: Path, part: str) -> Labelled:
    """The sentences of one file: each line has its label first."""
    lines = (folder / f"stsa.binary.{part}").read_text("utf-8").splitlines()
    return [(line[2:], int(line[0])) for line in lines]


def _task(train: Labelled, test: Labelled) -> Task:
    def drawn(rows: Labelled) -> Labelled:
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
        return [rows[i] for i in order.tolist()]

    train, test = drawn(train), drawn(test)
    return Task(train[:TAUGHT], train[TAUGHT : TAUGHT + FITTED], test[:TESTED])


def probe(fitted_ND: Tensor, fitted: Labelled, tested_ND: Tensor, tested: Labelled) -> float:
    """Accuracy of logistic regression: its regularised loss is convex, so nothing is drawn."""
    labels_N = torch.tensor([label for _, label in fitted], device=fitted_ND.device)
    wanted_N = torch.tensor([label for _, label in tested], device=fitted_ND.device)
    weight = torch.zeros(int(labels_N.max()) + 1, fitted_ND.size(1), device=fitted_ND.device)
    weight.requires_grad_()
    optimizer = torch.optim.LBFGS([weight], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(fitted_ND @ weight.T, labels_N) + 1e-4 * weight.square().sum()
        torch.autograd.backward(value)
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    return float(((tested_ND @ weight.T).argmax(-1) == wanted_N).float().mean())
