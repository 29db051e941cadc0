"""The files of benchmarks.dense_routing, and small copies of them for a machine without network.

    python -m benchmarks.depth_files FROM TO

FROM is searched for the files by their public names; TO gets a folder for each task, and tokenizers
made of its texts. IMDB keeps all training reviews and 5,000 of the others, images are 15,000 and
3,000. Of enwik8 it is 9 MB of the training part and 1 MB of the held-out one: rows say by how many
they were trained, so they are not taken for rows of the whole corpus.
"""

import argparse
import csv
import gzip
import json
import lzma
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.depth_tasks import TASKS
from moe_router.config import DataConfig
from moe_router.training.data import make_tokenizer, permute

VOCAB = 4000  # of the tokenizer that is made of the training sentences
NAMES = {
    "imdb": ("train.jsonl.xz", "test.jsonl.xz"),
    "sst2": ("stsa.binary.train", "stsa.binary.dev"),
    "cola": ("train.jsonl", "in_domain.jsonl", "out_of_domain.jsonl"),
    "enwik8": ("enwik8.xz",),
    "shakespeare": ("input.txt",),
    "cifar": ("cifar10_jpeg.npz",),
    "fashion": tuple(
        f"{part}-{kind}-ubyte.gz"
        for part in ("train", "t10k")
        for kind in ("images-idx3", "labels-idx1")
    ),
}
TEXTS = ("imdb", "sst2", "cola")  # have a tokenizer
PART = "enwik8-10m.txt"
TEST, IMAGES = 5000, (15_000, 3_000)  # of the copies

Of = Callable[[Path, Path], None]


def folders(data: Path) -> dict[str, Path]:
    """The folder of each task that is there, in order of the tasks."""
    own = {name: data / ("imdb" if name == "cascade" else name) for name in TASKS}
    return {name: folder for name, folder in own.items() if folder.is_dir()}


def files_of(name: str, folder: Path, runs: Path) -> tuple[str, ...]:
    """Keys of the config that say where the data of a task lies."""
    if (part := folder / PART).exists():
        return (f"data.path={part}", "data.source=text", "data.val_fraction=0.1")
    if name in ("enwik8", "shakespeare"):
        return (f"data.path={folder / NAMES[name][0]}",)
    if name == "cifar":
        file = folder / "cifar10_jpeg.npz"
        return (f"data.path={file}", f"data.val_path={file}")
    if name == "fashion":
        images = [folder / f"{part}-images-idx3-ubyte" for part in ("train", "t10k")]
        found = [p if p.exists() else p.with_name(p.name + ".gz") for p in images]
        return (f"data.path={found[0]}", f"data.val_path={found[1]}")
    train, held_out = (folder / file for file in NAMES[folder.name][:2])
    tokenizer = folder / "tokenizer.json"
    if not tokenizer.exists():
        tokenizer = runs / f"{folder.name}.json"
    if not tokenizer.exists():
        runs.mkdir(parents=True, exist_ok=True)
        _tokenizer(train, tokenizer)
    return (f"data.path={train}", f"data.val_path={held_out}", f"data.tokenizer={tokenizer}")


def elsewhere(name: str, folder: Path) -> Path | None:
    """Labelled texts of the same task from somewhere else; None: there are none."""
    other = {"imdb": folder.parent / "sst2" / NAMES["sst2"][1], "cola": folder / NAMES["cola"][2]}
    return other[name] if name in other and other[name].exists() else None


def _tokenizer(train: Path, to: Path) -> None:
    texts = DataConfig(source="labelled", path=str(train), labels=("0", "1"))
    make_tokenizer(texts, VOCAB, to)


def _some(count: int, of: int) -> list[int]:
    """So many of them, drawn once and for all."""
    drawn: list[int] = permute(np.arange(of), of, seed=0, epoch=0)[:count].tolist()
    return sorted(drawn)


def _reviews(source: Path, to: Path) -> None:
    if source.name.startswith("train"):
        _whole(source, to)
        return
    with lzma.open(source, "rt", encoding="utf-8") as file:
        lines = list(file)
    with lzma.open(to, "wt", encoding="utf-8", preset=1) as packed:
        packed.writelines(lines[n] for n in _some(TEST, len(lines)))


def _judgements(source: Path, to: Path) -> None:
    with source.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    said = [{"label": label, "text": text} for _, label, _, text in rows]
    to.write_text("".join(json.dumps(row) + "\n" for row in said), encoding="utf-8")


def _idx(source: Path, to: Path) -> None:
    content = gzip.decompress(source.read_bytes())
    head = 4 + 4 * content[3]  # its fourth byte says how many dimensions
    count = int.from_bytes(content[4:8], "big")
    body = np.frombuffer(content, np.uint8, offset=head).reshape(count, -1)
    chosen = _some(IMAGES["train" not in source.name], count)
    start = content[:4] + len(chosen).to_bytes(4, "big") + content[8:head]
    to.write_bytes(gzip.compress(start + body[chosen].tobytes(), mtime=0))


def _jpegs(source: Path, to: Path) -> None:
    kept: dict[str, Any] = {}
    with np.load(source, allow_pickle=False) as arrays:
        for part, count in zip(("train", "test"), IMAGES, strict=True):
            jpeg, offset_N1, label_N = (
                arrays[f"{part}_{k}"] for k in ("jpeg", "offsets", "labels")
            )
            chosen = _some(count, len(label_N))
            pieces = [jpeg[offset_N1[n] : offset_N1[n + 1]] for n in chosen]
            kept[f"{part}_jpeg"] = np.concatenate(pieces)
            kept[f"{part}_offsets"] = np.cumsum([0, *map(len, pieces)])
            kept[f"{part}_labels"] = label_N[chosen]
    np.savez_compressed(to, **kept)  # heads of JPEGs are alike


def _wikipedia(source: Path, to: Path) -> None:
    with lzma.open(source) as file:
        content = file.read()
    parts = (content[:9_000_000], content[90_000_000:91_000_000])
    text = "".join(part.decode("utf-8", errors="ignore") for part in parts)  # whole letters
    to.with_name(PART).write_text(text, encoding="utf-8")


def _whole(source: Path, to: Path) -> None:
    shutil.copyfile(source, to)


COLA = {
    "train": "in_domain_train",
    "in_domain": "in_domain_dev",
    "out_of_domain": "out_of_domain_dev",
}
HOW: dict[str, Of] = {
    "imdb": _reviews, "cola": _judgements, "cifar": _jpegs, "fashion": _idx,
    "enwik8": _wikipedia,
}  # fmt: skip


def copy(source: Path, to: Path, tasks: Iterable[str]) -> None:
    """Small copies of the files of these tasks."""
    for task in tasks:
        folder = to / task
        folder.mkdir(parents=True, exist_ok=True)
        for name in NAMES[task]:
            public = f"{COLA[Path(name).stem]}.tsv" if task == "cola" else name
            found = sorted(source.rglob(public))
            if not found:
                raise SystemExit(f"{source}: no {public} in it, want the files of {task}")
            HOW.get(task, _whole)(found[0], folder / name)
        if task in TEXTS:
            _tokenizer(folder / NAMES[task][0], folder / "tokenizer.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("to", type=Path)
    parser.add_argument("--tasks", default=",".join(NAMES), help="by commas")
    args = parser.parse_args()
    copy(args.source, args.to, args.tasks.split(","))
    for file in sorted(p for p in args.to.rglob("*") if p.is_file()):
        print(f"{file.stat().st_size / 2**20:8.2f} MiB  {file}")


if __name__ == "__main__":
    main()
