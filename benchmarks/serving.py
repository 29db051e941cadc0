"""The engine's decode rate and time to first token.

    python -m benchmarks.serving [--only PATTERN] [--seconds N] [--no-peer] [--profile] [--save]

Qwen3-30B-A3B's shapes cut to 12 layers (8.1B parameters, without its norms of queries and keys),
bf16, random weights made on the device, random prompts of 512 tokens, greedy. N streams begin
together; `decode/streamsN` counts tokens from when the last of them has its first one until the
first of them ends, `ttft/streamsN` is the median over streams from the request to its first token.
Both hold all that the engine does: queue, scheduler, sampling, events, text. `step_ms` is the step
alone, without engine or host, `graph` whether it is a CUDA graph.

Before it is timed, the engine's tokens are held against the model that reads prompt and answer at
once, without cache or steps. In bf16 experts and near-equal logits are tied differently there; on
average a token must lie within a tenth of a standard deviation of its logits of the likeliest one,
below which a token drawn blindly lies by four. (By the same model in fp32, on an H100, the engine's
tokens lie 0.009 to 0.035 below, those of the reading in bf16 0.016 to 0.032; one of 129 by 1.) The
ceiling counts the bytes that a step must read: weights that are hit, if choices are even, keys and
values. Without a GPU it runs at `--shapes tiny` in fp32.
"""

import argparse
import asyncio
import fnmatch
import gc
import statistics
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from benchmarks.contest import WrongResult, tell, why
from benchmarks.results import Row, provenance, save
from benchmarks.serving_answers import Answers, ask_all
from benchmarks.serving_cases import CASES, Case, Words, least_ms, new_model, prompts_of
from benchmarks.serving_peer import NAME, QUOTED, beside
from benchmarks.timing import Deadline, copy_ceiling
from moe_router.models import CausalLM, Sampling
from moe_router.serving.engine import Engine
from moe_router.serving.group import OneRank
from moe_router.serving.requests import Request, Work
from moe_router.serving.scheduler import Limits

GOALS = {1: 940.0, 16: 3000.0, 64: 9000.0, 256: 20000.0}
READ = 8192  # prompt tokens of a pass
NEAR = 0.1  # standard deviations


@torch.no_grad()
def check(model: CausalLM, prompt: tuple[int, ...], made: list[int]) -> float:
    """How many standard deviations of its logits a token lies below the likeliest, on average."""
    device = model.embed.weight.device
    ids_T = torch.tensor([*prompt, *made[:-1]], device=device)
    position_T = torch.arange(len(ids_T), dtype=torch.int32, device=device)
    offsets_B1 = torch.tensor([0, len(ids_T)], dtype=torch.int32)
    asked_R = torch.arange(len(prompt) - 1, len(ids_T), device=device)
    logits_RV = model(ids_T, position_T, offsets_B1, asked_R=asked_R).logits_TV
    own_R = logits_RV.gather(1, torch.tensor(made, device=device)[:, None])[:, 0]
    short = float(((logits_RV.amax(-1) - own_R) / logits_RV.std(-1)).mean())
    if not short <= NEAR:
        raise WrongResult(f"tokens lie {short:.3g} standard deviations below the likeliest")
    return short


def step_alone(
    group: OneRank,
    prompts: list[tuple[int, ...]],
    count: int,
    watch: AbstractContextManager[Any] | None = None,
) -> tuple[float, str]:
    """Milliseconds of a step without the host, and what it is. watch: is entered meanwhile."""
    decoder = group._decoder
    sampling = Sampling(max_new_tokens=4 * count, temperature=0.0)
    admit = tuple(Request(-1 - i, prompt, sampling) for i, prompt in enumerate(prompts))
    decoder.step(Work(admit, read=READ))
    steps = decoder._steps
    assert steps is not None
    while not steps.bucket:
        decoder.step(Work(read=READ))
    steps.launch()
    _wait()
    with watch or nullcontext():
        began = time.perf_counter()
        for _ in range(count):
            steps.launch()
        _wait()
        took = time.perf_counter() - began
    decoder.step(Work(drop=tuple(request.id for request in admit)))
    mode = "cpu" if not torch.cuda.is_available() else steps.uncaptured or "graph"
    return took / count * 1e3, mode


def profile(group: OneRank, prompts: list[tuple[int, ...]]) -> str:
    """Where the time of ten steps goes, by kernel."""
    watched = torch.profiler.profile()
    step_alone(group, prompts, 10, watched)
    key = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    table: str = watched.key_averages().table(sort_by=key, row_limit=40, max_name_column_width=70)
    return table


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(case: Case, model: CausalLM, streams: int, copy: float) -> Iterator[Row]:
    """The two rows of a number of streams."""
    prompts = prompts_of(case, streams)
    group = OneRank(model, None)
    total = streams * (case.prompt + case.new)
    limits = Limits(slots=streams, tokens=total, prefill=READ, queue=max(streams, 256))

    async def run() -> Answers:
        async with Engine(group, Words(case.vocab), "random", limits=limits) as engine:
            tell(f"{streams} streams: compiles and captures")
            warm = await ask_all(engine, prompts, min(9, case.new))
            check(model, prompts[0], warm.tokens[0])
            tell(f"{streams} streams")
            return await ask_all(engine, prompts, case.new)

    answers = asyncio.run(run())
    error = check(model, prompts[-1], answers.tokens[-1])
    rate, slow = answers.decode()
    alone, mode = step_alone(group, prompts, min(64, case.new))
    ceiling = least_ms(case, streams, copy)
    common = {"correct": True, "error": float(f"{error:.3g}"), "mode": mode}
    yield {
        "name": f"decode/streams{streams}", "value": round(rate, 1), "unit": "tokens/s",
        "p90": round(streams / slow, 1), "step_ms": round(alone, 4),
        "ceiling": round(streams / ceiling * 1e3, 1) if ceiling else 0.0,
        "goal": GOALS.get(streams), **common,
    }  # fmt: skip
    first = answers.first()
    yield {
        "name": f"ttft/streams{streams}", "value": round(statistics.median(first) * 1e3, 2),
        "unit": "ms", "p90": round(first[len(first) * 9 // 10] * 1e3, 2), "ceiling": 0.0,
        "goal": None, **common,
    }  # fmt: skip


def against(row: Row, peers: dict[str, Any]) -> Row:
    """The row beside the peer's value."""
    entry = peers[NAME]
    rival, value = entry.get("value"), row.get("value")
    ratio = round(value / rival, 2) if rival and value else None
    best = NAME if rival else None
    return row | {"best_peer": best, "peer_value": rival, "ratio": ratio, "peers": peers}


def quoted(streams: int) -> dict[str, Any]:
    if streams not in QUOTED:
        return {NAME: {"reason": "not measured at these shapes"}}
    return {NAME: {"value": QUOTED[streams], "quoted": True}}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="*", help="decode rows by shell pattern, with their ttft")
    parser.add_argument("--shapes", choices=sorted(CASES))
    parser.add_argument("--seconds", type=float, default=280.0, help="no row begins after them")
    how = argparse.BooleanOptionalAction
    parser.add_argument("--peer", action=how, default=True, help="measure transformers, at the end")
    parser.add_argument("--profile", action="store_true", help="print the kernels of a step")
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    cuda, end = torch.cuda.is_available(), time.monotonic() + args.seconds
    case, deadline = CASES[args.shapes or ("qwen3" if cuda else "tiny")], Deadline(args.seconds)
    origin = provenance("cuda" if cuda else "cpu")
    copy = copy_ceiling() if cuda else 0.0
    tell("makes the model")
    model = new_model(case)
    made: dict[int, Row] = {}

    def tell_row(row: Row) -> None:
        print({key: row[key] for key in row if key not in origin}, flush=True)
        if args.save:
            save("serving", [row | origin])

    for streams in case.streams:
        name = f"decode/streams{streams}"
        if not any(fnmatch.fnmatch(name, pattern) for pattern in args.only.split(",")):
            continue
        if deadline.over():
            tell(f"{name}: no time left")
            continue
        try:
            for row in measure(case, model, streams, copy):
                decode = row["name"] == name
                row = against(row, quoted(streams)) if decode else row
                made |= {streams: row} if decode else {}
                tell_row(row)
        except Exception as problem:  # one row must not cost the others
            tell_row({"name": name, "value": None, "correct": False, "reason": why(problem)})
        gc.collect()
    if args.profile and made:
        print(profile(OneRank(model, None), prompts_of(case, min(made))), flush=True)
    del model
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
    # the most streams first: they say most, and the time may be over
    for streams, row in reversed(made.items()) if args.peer and cuda else ():
        left = end - time.monotonic()
        peers = beside(case.config, case.vocab, prompts_of(case, streams), case.new, left)
        tell_row(against(row, peers))


if __name__ == "__main__":
    main()
