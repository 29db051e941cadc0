"""A MiniLM fine-tuned on SST-2, from which tokens are pruned: labels that are right, and speed.

    python -m benchmarks.minilm_tuned --model DIR --data DIR --tuned DIR [--only PATTERN] [--save]

The model: sentence-transformers/all-MiniLM-L6-v2, with a head for two labels, fine-tuned for two
epochs of the 6,920 training sentences and kept in --tuned; after that its weights stay. Routers
after the second and the fourth of six layers each leave a share `keep` of the tokens. They are
taught by trials (`moe_router.layers.trial`) on the loss of the labels; beside them a random router,
one that sees positions, the longest states, and the most attention received. Measured on the 2,693
sentences of the development and the test part that nothing learned from.
"""

import argparse
import fnmatch
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.contest import tell
from benchmarks.minilm_models import BATCH, Setting, rates, teach, tokens_of, with_routers
from benchmarks.minilm_tasks import sst2
from benchmarks.results import Row, provenance, save

EPOCHS, RATE = 2, 5e-5
TIMED = 256  # sentences
SEEDS = 3
KEEPS = (0.7, 0.5, 0.3)
ROWS = {
    name: setting
    for keep in KEEPS
    for name, setting in {
        f"prune/{keep}": Setting(keep, taught="trials", seeds=SEEDS),
        f"prune/{keep}/frozen": Setting(keep, seeds=SEEDS),
        f"prune/{keep}/position": Setting(keep, router="position", taught="trials", seeds=SEEDS),
        f"prune/{keep}/norm": Setting(keep, router="norm"),
        f"prune/{keep}/attention": Setting(keep, router="attention"),
    }.items()
}
Labelled = tuple[list[str], Tensor]


@dataclass(frozen=True, slots=True)
class Bench:
    """Attributes:
    folder: of the fine-tuned model.
    taught, tested: sentences and their labels.
    """

    folder: Path
    tokenizer: Any
    taught: Labelled
    tested: Labelled

    def model(self) -> Any:
        from transformers import AutoModelForSequenceClassification

        return AutoModelForSequenceClassification.from_pretrained(self.folder).eval()


def read(data: Path, *parts: str) -> Labelled:
    """Sentences of SST-2."""
    texts, labels = zip(*(row for part in parts for row in sst2(data, part)), strict=True)
    return list(texts), torch.tensor(labels)


def prepare(folder: Path, data: Path, tuned: Path) -> Bench:
    """Fine-tunes, unless it has been done."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    bench = Bench(tuned, tokenizer, read(data, "train"), read(data, "dev", "test"))
    if not (tuned / "config.json").exists():
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
        tune(model, bench)
        model.save_pretrained(tuned)
    return bench


def tune(model: Any, bench: Bench) -> None:
    texts, label_N = bench.taught
    steps = EPOCHS * len(texts) // BATCH
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, max(1, steps))
    order = torch.cat([torch.randperm(len(texts)) for _ in range(EPOCHS)])
    model.train()
    for step, drawn in enumerate(order[: steps * BATCH].view(steps, -1).tolist()):
        logits = model(**tokens_of(model, bench.tokenizer, [texts[i] for i in drawn])).logits
        loss = F.cross_entropy(logits, label_N[drawn])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            tell(f"fine-tuning: step {step} of {steps}, loss {loss.item():.3f}")
    model.eval()


def made(bench: Bench, setting: Setting, seed: int) -> Any:
    """The fine-tuned model with routers, which have learned what `setting` says."""
    torch.manual_seed(seed)
    model = with_routers(bench.model(), setting)
    texts, label_N = bench.taught

    def loss_of(drawn: list[int]) -> Tensor:
        logits = model(**tokens_of(model, bench.tokenizer, [texts[i] for i in drawn])).logits
        return F.cross_entropy(logits, label_N[drawn], reduction="none")

    if setting.taught is not None:
        teach(model, setting.taught, loss_of, len(texts), seed)
    return model


@torch.no_grad()
def accuracy(model: Any, bench: Bench) -> float:
    texts, label_N = bench.tested
    right = 0
    for first in range(0, len(texts), TIMED):
        logits = model(**tokens_of(model, bench.tokenizer, texts[first : first + TIMED])).logits
        right += int((logits.argmax(-1) == label_N[first : first + TIMED]).sum())
    return right / len(texts)


def speed(bench: Bench, model: Any, rounds: int) -> Row:
    inputs = tokens_of(model, bench.tokenizer, bench.tested[0][:TIMED])
    models = {
        "routed": model, "packed": with_routers(bench.model(), Setting(1.0)),
        "transformers": bench.model(),
    }  # fmt: skip
    return rates(models, lambda of: of(**inputs), TIMED, rounds)


def row(bench: Bench, name: str, full: float, rounds: int) -> Row:
    setting, found = ROWS[name], []
    for seed in range(setting.seeds):
        model = made(bench, setting, seed)
        found.append(accuracy(model, bench))
        tell(f"{name}, seed {seed}: {found[-1]:.4f}")
    mean = statistics.mean(found)
    return {
        "name": name,
        "value": round(mean, 4),
        "unit": "accuracy",
        "seeds": [round(x, 4) for x in found],
        "std": round(statistics.stdev(found), 4) if len(found) > 1 else None,
        "retained": round(mean / full, 4),
        **speed(bench, model, rounds),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="the folder of stsa.binary.*")
    parser.add_argument("--tuned", type=Path, required=True, help="where it is kept")
    parser.add_argument("--only", default="*", help="rows by shell pattern, several by commas")
    parser.add_argument("--rounds", type=int, default=7, help="samples of each speed")
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args(arguments)
    bench, origin = prepare(args.model, args.data, args.tuned), provenance("cpu")
    full = accuracy(bench.model(), bench)
    rows: list[Row] = [{"name": "full", "value": round(full, 4), "unit": "accuracy", "seeds": 1}]
    names = [n for n in ROWS if any(fnmatch.fnmatch(n, p) for p in args.only.split(","))]
    for name in ["full", *names]:
        of = rows[0] if name == "full" else row(bench, name, full, args.rounds)
        print(of, flush=True)
        if args.save:
            save("minilm_tuned", [of | origin])


if __name__ == "__main__":
    main()
