"""One token of a long text: routed attention to a paged cache beside dense attention to it."""

from typing import Any

import torch

from benchmarks.attention_cases import BOUND, relative
from benchmarks.contest import WrongResult
from benchmarks.timing import Run, capture, interleave
from moe_router.models.attend_routed_cached import attend_chosen_pages
from moe_router_kernels import reference_pages
from moe_router_kernels.paged_op import attend_pages

TOP_K, PAGE, ROUNDS = 16, 64, 50
DECODED = (32768, 65536)


def decode_name(tokens: int) -> str:
    return f"decode/top{TOP_K}/T{tokens}"


def by_definition(
    q: torch.Tensor, pages: torch.Tensor, table: torch.Tensor, target: torch.Tensor, tokens: int
) -> torch.Tensor:
    """(KV heads, query heads of each, channels), fp32: attention to the keys of chosen blocks."""
    kv_heads, channels = pages.size(2), pages.size(4)
    seen = torch.tensor([tokens], device=q.device)
    k, v = (x[0].float() for x in reference_pages.read(pages, table, seen))
    key = (target[..., None] * PAGE + torch.arange(PAGE, device=q.device)).flatten(1)
    last = (tokens - 1) % PAGE + 1 + (TOP_K - 1) * PAGE
    key = key[:, :last, None].expand(-1, -1, channels)
    keys, values = k.gather(1, key), v.gather(1, key)
    score = q.float().view(kv_heads, -1, channels) @ keys.transpose(1, 2)
    wanted: torch.Tensor = (score * channels**-0.5).softmax(-1) @ values
    return wanted


def measure_decode(
    tokens: int, heads: int, kv_heads: int, channels: int, device: torch.device
) -> dict[str, Any]:
    """Microseconds of one query with `tokens` slots in the cache, at the end of its text."""
    generator = torch.Generator(device).manual_seed(tokens)
    dtype, N = torch.bfloat16 if device.type == "cuda" else torch.float32, -(-tokens // PAGE)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    q, pages = draw(1, heads, channels), draw(2, N + 1, kv_heads, PAGE, channels)
    order = torch.randperm(N, generator=generator, device=device)
    table, row = order[None].int() + 1, torch.zeros(1, dtype=torch.int64, device=device)
    slot = row + tokens - 1
    scores = torch.rand(kv_heads, N - 1, generator=generator, device=device)
    target = scores.argsort(-1)[:, : TOP_K - 1].sort(-1).values
    target = torch.cat([target, target.new_full((kv_heads, 1), N - 1)], -1)[None].int()

    def ours() -> torch.Tensor:
        return attend_chosen_pages(q, pages, table, row, slot, target, PAGE)[0]

    def dense() -> torch.Tensor:
        return attend_pages(q, pages, table, row, slot + 1)

    wanted = by_definition(q, pages, table, target[0].long(), tokens)
    error = relative(ours().view(wanted.shape), wanted)
    if not error < BOUND[dtype]:
        raise WrongResult(f"error {error:.3g}")
    runs: dict[str, Run] = {"ours": ours, "dense": dense}
    if device.type == "cuda":
        runs = {name: capture(run) for name, run in runs.items()}
    times = interleave(runs, rounds=ROUNDS if device.type == "cuda" else 2)
    value, rival = times["ours"].median, times["dense"].median
    return {
        "value": round(value, 1), "p90": round(times["ours"].p90, 1), "unit": "us",
        "best_peer": "attend_pages", "peer_value": round(rival, 1),
        "ratio": round(rival / value, 3), "error": float(f"{error:.3g}"),
    }  # fmt: skip
