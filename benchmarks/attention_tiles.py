"""Each kernel of routed attention alone, as each tile cuts it: which tile is the best for which."""

from typing import Any

import torch

from benchmarks.attention_cases import Case, Shape
from benchmarks.timing import interleave
from moe_router_kernels import attention_op

# products of a pair of blocks
KERNELS = {"forward": 2, "queries": 3, "keys": 4}
TILED = {32768: "share30", 65536: "top16"}
ROUNDS = 5


def tile_name(kernel: str, tile: str, kind: str, tokens: int) -> str:
    return f"tiles/{kernel}/{tile}/{kind}/T{tokens}"


def tile_names(tokens: int) -> list[str]:
    """Rows at this length."""
    if tokens not in TILED:
        return []
    tiles = ("wide", "middle", "narrow")
    return [tile_name(k, tile, TILED[tokens], tokens) for k in KERNELS for tile in tiles]


def measure_tile(case: Case, name: str) -> dict[str, Any]:
    """TFLOP/s of executed pairs."""
    from moe_router_kernels import block_attention as launch

    _, kernel, tile, kind, _ = name.split("/")
    shape = Shape(**{**vars(case.shape), "kind": kind})
    first_N, last_N = case.blocks.first_N, case.blocks.last_N
    target_NJK, count_NJ2, _ = case.choose(kind)
    assert count_NJ2 is not None
    whole_N = last_N - first_N == shape.block
    block_R, _, offsets_G1 = attention_op.by_key(target_NJK, count_NJ2, whole_N, "auto")
    none = torch.empty(0, device=case.q.device)
    lists = launch.Lists(first_N, last_N, target_NJK, count_NJ2, none)
    groups = launch.Groups(block_R, none, offsets_G1)
    q, k, v = (x.detach() for x in case.leaves)
    how = (shape.block, True, tile)
    out, lse_HT = launch.forward(q, k, v, lists, shape.block, True, "auto")
    kept = launch.Kept(case.grad, torch.zeros_like(lse_HT), q, k, v, out, lse_HT)
    if kernel == "forward":
        took = interleave({"": lambda: launch.forward(q, k, v, lists, *how)}, rounds=ROUNDS)
    elif kernel == "queries":
        took = interleave({"": lambda: launch.grad_queries(kept, lists, *how)}, rounds=ROUNDS)
    else:
        dot_HT = launch.grad_queries(kept, lists, shape.block, True, "auto")[2]
        run = lambda: launch.grad_keys(kept, dot_HT, lists, groups, *how)  # noqa: E731
        took = interleave({"": run}, rounds=ROUNDS)
    flops = KERNELS[kernel] / 2 * shape.flops(shape.pairs)
    return {
        "value": round(flops / took[""].median / 1e6, 1), "us": round(took[""].median, 1),
        "cut": str(launch.TILES[kernel][tile]), "best": launch.BEST[kernel] == tile,
    }  # fmt: skip
