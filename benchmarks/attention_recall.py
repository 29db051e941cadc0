"""Does choosing blocks by content beat chance? Recall of a text's first half, with controls.

    python -m benchmarks.attention_recall --save

A row is 128 random tokens and the same again; what counts is the accuracy in the second half,
where each token stands 128 tokens back. A small causal model of two layers sees 26% of the
pairs: its own block and, by variant, the blocks that the router chose, the last ones, random ones
or the first ones. Dense attention sees all. Equal steps, batches and seeds for all.
"""

import argparse
import statistics
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from benchmarks.results import Row, provenance, save
from moe_router.config import AttentionConfig, ModelConfig

HALF, VOCAB, BATCH, LR, WARMUP = 128, 64, 8, 3e-3, 50
BLOCK, TOP_K = 8, 5
HOW: dict[str, dict[str, object] | None] = {
    "dense": None,
    "chosen": {},
    "chosen, gated": {"gated": True},
    "window": {"window": (TOP_K - 1) * BLOCK},
    "random": {"router": "random"},
    "position": {"router": "position"},
}


def model_config(name: str) -> ModelConfig:
    how = HOW[name]
    routed = None
    if how is not None:
        sizes: dict[str, object] = {"block": BLOCK, "top_k": TOP_K, "window": 0}
        routed = AttentionConfig(kind="routed", **(sizes | how))  # type: ignore[arg-type]
    return ModelConfig(layers=2, dim=64, heads=4, kv_heads=2, hidden=128, attention=routed)


def recall(name: str, seed: int, steps: int) -> float:
    """Accuracy in the second half, of 64 held-out rows after training."""
    import torch
    import torch.nn.functional as F

    from moe_router.models import CausalLM, init_parameters

    torch.set_num_threads(1)
    model = CausalLM(model_config(name), VOCAB)
    init_parameters(model, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.01, betas=(0.9, 0.98))

    def rows(count: int) -> torch.Tensor:
        return torch.randint(VOCAB, (count, HALF), generator=generator).repeat(1, 2)

    def second_half(ids: torch.Tensor) -> torch.Tensor:
        position = torch.arange(2 * HALF, dtype=torch.int32).repeat(len(ids))
        offsets = torch.arange(len(ids) + 1, dtype=torch.int32) * 2 * HALF
        logits: torch.Tensor = model(ids.flatten(), position, offsets).logits_TV
        return logits.view(len(ids), 2 * HALF, -1)[:, HALF:-1]

    for step in range(steps):
        optimizer.param_groups[0]["lr"] = LR * min(1, (step + 1) / WARMUP)
        ids = rows(BATCH)
        guess, wanted = second_half(ids), ids[:, HALF + 1 :]
        loss = F.cross_entropy(guess.flatten(0, 1), wanted.flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        ids = rows(64)
        right = second_half(ids).argmax(-1) == ids[:, HALF + 1 :]
    accuracy = float(right.float().mean())
    print(f"{name:14} seed {seed}: {accuracy:.4f}", flush=True)
    return accuracy


def table_row(name: str, values: list[float], steps: int) -> Row:
    std = round(statistics.stdev(values), 4) if len(values) > 1 else None
    return {
        "name": f"recall/{name}", "value": round(statistics.mean(values), 4), "unit": "accuracy",
        "seeds": [round(v, 4) for v in values], "mean": round(statistics.mean(values), 4),
        "std": std, "steps": steps, "chance": round(1 / VOCAB, 4),
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--only", default=",".join(HOW), help="variants, by semicolons")
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args(arguments)
    names = list(HOW) if args.only == ",".join(HOW) else args.only.split(";")
    jobs = [(name, seed, args.steps) for seed in range(args.seeds) for name in names]
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
        found = list(pool.map(recall, *zip(*jobs, strict=True)))
    for name in names:
        values = [v for v, job in zip(found, jobs, strict=True) if job[0] == name]
        row = table_row(name, values, args.steps)
        print(row["name"], row["value"], row["std"], row["seeds"])
        if args.save:
            save("attention", [row | provenance("cpu")])


if __name__ == "__main__":
    main()
