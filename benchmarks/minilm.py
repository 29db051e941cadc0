"""A pretrained MiniLM from which tokens are pruned: how good its embeddings stay, and how fast.

    python -m benchmarks.minilm --model DIR --data DIR [--device cuda] [--only PATTERN]
        [--seconds S] [--batch N] [--save]

The model: sentence-transformers/all-MiniLM-L6-v2. The data: sst2/stsa.binary.train and .test,
banking77/train.csv and test.csv. Routers after the second and the fourth of six layers each leave
a share `keep` of the tokens; the model itself stays as it is. They are taught by the model alone:
the pruned embedding of a training sentence is to be the full one, by trials
(`moe_router.layers.trial`) or by the gradient of what stays. Then, on other sentences: the cosine
with the full embedding, the correlation of the similarities of pairs of sentences with those of the
full model, the accuracy of a linear probe, executed FLOPs by the Ledger, and sentences a second
beside the same packed rows without pruning, and beside transformers.
"""

import argparse
import fnmatch
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.contest import tell
from benchmarks.minilm_models import (
    BATCH,
    ROWS,
    Setting,
    load,
    rates,
    routed,
    teach,
    tokens_of,
)
from benchmarks.minilm_tasks import Labelled, Task, probe, read
from benchmarks.results import Row, provenance, save
from benchmarks.timing import Deadline

# sentences in a batch; 512 keep a GPU busy for 2 ms, less than any host needs to launch six layers
TIMED = {"cpu": (32, torch.float32), "cuda": (4096, torch.bfloat16)}


@dataclass(frozen=True, slots=True)
class Full:
    """The model as it is. The embeddings of each task are those of `fitted` and `tested`."""

    folder: Path
    tokenizer: Any
    device: str
    tasks: dict[str, Task]
    taught_ND: Tensor
    embedded: dict[str, tuple[Tensor, Tensor]]


def embed(model: Any, inputs: Any) -> Tensor:
    """(N, D), length 1: the mean of the tokens that are there, normalised."""
    x_BSD = model(**inputs).last_hidden_state * inputs["attention_mask"][..., None]
    return F.normalize(x_BSD.sum(1), dim=-1)


def embed_all(model: Any, tokenizer: Any, rows: Labelled) -> Tensor:
    texts = [text for text, _ in rows]
    with torch.no_grad():
        parts = [
            embed(model, tokens_of(model, tokenizer, texts[i : i + BATCH]))
            for i in range(0, len(texts), BATCH)
        ]
    return torch.cat(parts)


def prepare(folder: Path, data: Path, device: str) -> Full:
    from transformers import AutoTokenizer

    tell("the full model's embeddings")
    model, tokenizer = load(folder, device), AutoTokenizer.from_pretrained(folder)
    tasks = read(data)
    taught = [row for task in tasks.values() for row in task.taught]
    embedded = {
        name: (embed_all(model, tokenizer, t.fitted), embed_all(model, tokenizer, t.tested))
        for name, t in tasks.items()
    }
    return Full(folder, tokenizer, device, tasks, embed_all(model, tokenizer, taught), embedded)


def score(full: Full, name: str, fitted_ND: Tensor, tested_ND: Tensor) -> dict[str, float]:
    """Embeddings of one task beside the full model's, and a linear probe on them."""
    wanted_ND = full.embedded[name][1]
    upper = torch.triu_indices(len(tested_ND), len(tested_ND), 1, device=tested_ND.device)
    pairs = [(x @ x.T)[upper[0], upper[1]] for x in (tested_ND, wanted_ND)]
    task = full.tasks[name]
    return {
        "cosine": float((tested_ND * wanted_ND).sum(-1).mean()),
        "correlation": float(torch.corrcoef(torch.stack(pairs))[0, 1]),
        "probe": probe(fitted_ND, task.fitted, tested_ND, task.tested),
    }


def with_seed(full: Full, setting: Setting, seed: int) -> Any:
    """The routed model, taught."""
    model = routed(full.folder, full.device, setting, seed)
    texts = [text for task in full.tasks.values() for text, _ in task.taught]

    def missed(drawn: list[int]) -> Tensor:
        got_BD = embed(model, tokens_of(model, full.tokenizer, [texts[i] for i in drawn]))
        return 1 - (got_BD * full.taught_ND[drawn]).sum(-1)

    if setting.taught is not None:
        teach(model, setting.taught, missed, len(texts), seed)
    return model


def one_seed(full: Full, setting: Setting, seed: int) -> dict[str, Any]:
    model = with_seed(full, setting, seed)
    return {
        name: score(
            full, name, *(embed_all(model, full.tokenizer, x) for x in (task.fitted, task.tested))
        )
        for name, task in full.tasks.items()
    }


def speed(full: Full, setting: Setting, rounds: int, batch: int = 0) -> dict[str, Any]:
    """Sentences a second, in turn, and the FLOPs that ran over the dense ones; on a GPU in bf16.

    Args:
        batch: sentences; 0: as usual.
    """
    usual, dtype = TIMED[full.device]
    each = (batch or usual) // len(full.tasks)
    texts = [text for task in full.tasks.values() for text, _ in islice(cycle(task.tested), each)]
    routing, packed = (routed(full.folder, full.device, x) for x in (setting, Setting(1.0)))
    models = {
        "routed": routing, "packed": packed, "transformers": load(full.folder, full.device),
    }  # fmt: skip
    inputs = tokens_of(routing, full.tokenizer, texts)
    for model in models.values():
        model.to(dtype)
    return rates(models, lambda model: embed(model, inputs), len(texts), rounds)


def rows(
    full: Full, patterns: list[str], deadline: Deadline, rounds: int, batch: int = 0
) -> Iterator[Row]:
    """The full model's probes, and a row for each setting, as it is made."""
    origin = provenance(full.device)
    plain = {name: score(full, name, *full.embedded[name]) for name in full.tasks}
    yield {"name": "full", "seeds": 1, **plain, "executed": 1.0} | origin
    for name, setting in ROWS.items():
        if not any(fnmatch.fnmatch(name, pattern) for pattern in patterns):
            continue
        if deadline.over():
            tell(f"{name}: not begun, the time is over")
            continue
        tell(name)
        seeds = [one_seed(full, setting, seed) for seed in range(setting.seeds)]
        measured = spread(seeds) | speed(full, setting, rounds, batch)
        yield {"name": name, "seeds": len(seeds), **measured} | origin


def spread(seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """Means, and standard deviations where there are several seeds."""
    out: dict[str, Any] = {}
    for task, measures in seeds[0].items():
        for key in measures:
            values = [seed[task][key] for seed in seeds]
            out.setdefault(task, {})[key] = statistics.mean(values)
            if len(values) > 1:
                out[task][f"{key}_std"] = statistics.stdev(values)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", default="*", help="rows by shell pattern, several by commas")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no row after these")
    parser.add_argument("--rounds", type=int, default=7, help="samples of each speed")
    parser.add_argument("--batch", type=int, default=0, help="sentences that are timed at once")
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    deadline = Deadline(args.seconds)
    full = prepare(args.model, args.data, args.device)
    for row in rows(full, args.only.split(","), deadline, args.rounds, args.batch):
        print(row, flush=True)
        if args.save:
            save("minilm", [row])


if __name__ == "__main__":
    main()
