"""Does a learned router beat chance? Tiny-Shakespeare, several seeds, three controls.

    python -m benchmarks.quality --data input.txt --device cuda --save

All four models execute the same FLOPs per token in their feed-forward layers: the dense one is
as wide as the experts that a token visits. The frozen router never learns; the position router
learns, but sees no content. Each is trained on one rank, on the same batches.
"""

import argparse
import dataclasses
import statistics
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from benchmarks.results import Row, provenance, save
from moe_router.config import Config
from moe_router.config_file import load_config

VARIANTS = ("learned", "frozen", "position", "dense")
TABLE = Path(__file__).parent.parent / "docs" / "results" / "shakespeare.md"


def variant_config(base: Config, name: str) -> Config:
    """The config of one row of the table."""
    moe = base.model.moe
    assert moe is not None
    model = base.model
    match name:
        case "frozen":
            model = dataclasses.replace(model, moe=dataclasses.replace(moe, frozen=True))
        case "position":
            model = dataclasses.replace(model, moe=dataclasses.replace(moe, router="position"))
        case "dense":
            model = dataclasses.replace(
                model, moe=None, hidden=moe.top_k * moe.hidden + moe.shared_hidden
            )
    return dataclasses.replace(base, model=model)


def train(base: Config, name: str, seed: int, device: str) -> float:
    """Held-out bits per byte after base.train.steps steps."""
    import torch

    from moe_router.training.loop import Trainer

    torch.set_num_threads(1)
    config = variant_config(base, name)
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, seed=seed))
    trainer = Trainer(config, device=device)
    for _ in range(config.train.steps):
        trainer.train_step()
    record = trainer.evaluate()
    trainer.close()
    print(f"{name:9} seed {seed}: {record.bits_per_byte:.4f} bits per byte", flush=True)
    assert record.bits_per_byte is not None  # of text
    return record.bits_per_byte


def rows_of(values: dict[str, list[float]], goal_of: str, origin: Row) -> list[Row]:
    """One row per variant; `beats` says by how many pooled standard deviations learned wins."""
    mean = {name: statistics.mean(v) for name, v in values.items()}
    std = {name: statistics.stdev(v) for name, v in values.items()}
    rows = []
    for name, of_seeds in values.items():
        pooled = ((std[name] ** 2 + std[goal_of] ** 2) / 2) ** 0.5
        gap = (mean[name] - mean[goal_of]) / pooled if name != goal_of else None
        rows.append(
            {
                "name": f"shakespeare/{name}",
                "value": round(mean[name], 4),
                "unit": "bits per byte",
                "seeds": [round(v, 4) for v in of_seeds],
                "mean": round(mean[name], 4),
                "std": round(std[name], 4),
                "learned_ahead_by_std": None if gap is None else round(gap, 2),
                **origin,
            }
        )
    return rows


def write_table(rows: list[Row], command: str, base: Config) -> None:
    moe = base.model.moe
    assert moe is not None
    origin = rows[0]
    lines = [
        "# A learned router against three controls, Tiny-Shakespeare",
        "",
        f"{base.model.layers} layers, width {base.model.dim}, {moe.experts} experts of width "
        f"{moe.hidden}, top-{moe.top_k}; {base.train.steps} steps of "
        f"{base.train.batch} x {base.data.seq_len} bytes. Every row executes the same feed-forward "
        "FLOPs per token. Lower is better; ± is the standard deviation over seeds.",
        "",
        "| model | held-out bits per byte | seeds | learned is ahead by (pooled std) | verdict |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        gap = row["learned_ahead_by_std"]
        verdict = "" if gap is None else "learned wins" if gap > 1 else "**not beaten**"
        seeds = ", ".join(f"{v:.4f}" for v in row["seeds"])
        lines.append(
            f"| {row['name'].split('/')[1]} | {row['mean']:.4f} ± {row['std']:.4f} | {seeds} "
            f"| {'' if gap is None else gap} | {verdict} |"
        )
    lines += [
        "",
        f"{origin['device']}, torch {origin['torch']}, commit {origin['commit']}, "
        f"{origin['date']}.",
        "",
        f"    {command}",
        "",
    ]
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--config", default="configs/shakespeare.yaml")
    parser.add_argument("--data", required=True, help="path of Tiny-Shakespeare's input.txt")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--jobs", type=int, default=1, help="trainings side by side")
    parser.add_argument("--only", nargs="*", default=VARIANTS, choices=VARIANTS)
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    base = load_config(
        args.config,
        [
            f"data.path={args.data}",
            f"train.steps={args.steps}",
            "cluster.actors=1",
            "run.record=false",
        ],
    )
    jobs = [(name, seed) for seed in range(args.seeds) for name in args.only]
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(train, base, name, seed, args.device) for name, seed in jobs]
        results = [future.result() for future in futures]
    values = {
        name: [r for (n, _), r in zip(jobs, results, strict=True) if n == name]
        for name in args.only
    }
    rows = rows_of(values, "learned", provenance(args.device))
    for row in rows:
        print(row)
    if args.save:
        print(save("quality", rows))
        command = (
            f"python -m benchmarks.quality --data input.txt --steps {args.steps} "
            f"--seeds {args.seeds} --device {args.device} --jobs {args.jobs} --save"
        )
        write_table(rows, command, base)
        print(TABLE)


if __name__ == "__main__":
    main()
