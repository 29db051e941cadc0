"""How the kernels of routed attention (`attention_kernels`) are cut, and started."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from moe_router_kernels.attention_kernels import _forward_kernel, _keys_kernel, _queries_kernel
from moe_router_kernels.launch import launch
from moe_router_kernels.scratch import scratch

LOG2_E = 1.4426950408889634  # exponentials are to base 2


class Lists(NamedTuple):
    """Who attends to whom, each pair of blocks once; N blocks, J KV heads, K choices at most.

    Attributes:
        first_N, last_N: int32, where each block begins and ends.
        target_NJK: int32, key blocks of each unit: first those that need no mask, then the
            others, then -1.
        count_NJ2: int32, how many need none, and how many there are.
        gate_NJK: fp32, factor on what a pair adds to the output; empty: 1.
    """

    first_N: Tensor
    last_N: Tensor
    target_NJK: Tensor
    count_NJ2: Tensor
    gate_NJK: Tensor


class Groups(NamedTuple):
    """The same by key block: groups 2 (n J + j) of pairs that need no mask, and the next, of those
    that do.

    Attributes:
        block_R: int32, query blocks by group.
        gate_R: fp32, the gate of each; empty: 1.
        offsets_G1: int32, their bounds.
    """

    block_R: Tensor
    gate_R: Tensor
    offsets_G1: Tensor


@dataclass(frozen=True, slots=True)
class Tile:
    """Most rows of a tile, warps, and by how many steps loads are ahead."""

    rows: int
    warps: int
    stages: int

    def heads(self, group: int, block: int, channels: int) -> int:
        """Query heads that a tile holds, of `group` that share a KV head."""
        room = self.rows * 128 // max(channels, 128) // block
        return max([n for n in (1, 2, 4, 8, 16) if n <= room and group % n == 0], default=1)

    def fitted(self, rows: int, block: int, row_bytes: int) -> "Tile":
        """The same, for a program that keeps `rows` in shared memory, beside two blocks a step."""
        stages = (SHARED_BYTES // row_bytes - rows) // (2 * block)
        # a program has an accumulator of its rows: few if they are, all registers if they are many
        warps = 4 if block * row_bytes < 64 * 128 else 8 if block * row_bytes > 64 * 256 else 0
        return Tile(self.rows, warps or self.warps, max(1, min(self.stages, stages)))


SHARED_BYTES = 220 << 10  # of an H100's 227 KiB
TILES = {
    "forward": {"wide": Tile(256, 8, 3), "middle": Tile(128, 8, 3), "narrow": Tile(128, 4, 2)},
    "queries": {"wide": Tile(128, 8, 3), "middle": Tile(128, 8, 2), "narrow": Tile(64, 4, 2)},
    "keys": {"wide": Tile(64, 8, 2), "middle": Tile(64, 8, 3), "narrow": Tile(64, 4, 2)},
}
BEST = {"forward": "narrow", "queries": "wide", "keys": "narrow"}  # docs/log.md


def _cut(kernel: str, tiles: str, q_THd: Tensor, J: int, block: int) -> tuple[int, Tile]:
    """Query heads of a tile, and the tile, by name; `auto` is the best for each kernel."""
    _, H, d = q_THd.shape
    tile = TILES[kernel][BEST[kernel] if tiles == "auto" else tiles]
    heads = 1 if kernel == "keys" else tile.heads(H // J, block, d)
    rows = heads * block * (1 if kernel == "forward" else 2)
    return heads, tile.fitted(rows, block, d * q_THd.element_size())


def _how(q_THd: Tensor, lists: Lists, block: int, causal: bool) -> dict[str, object]:
    if q_THd.device.type == "cuda":
        triton.set_allocator(scratch)
    precision = "ieee" if q_THd.dtype == torch.float32 else "tf32"
    sizes = {"D": q_THd.size(2), "BLOCK": block, "CAUSAL": causal}
    return {**sizes, "GATED": lists.gate_NJK.numel() > 0, "PRECISION": precision}


def forward(
    q_THd: Tensor, k_TJd: Tensor, v_TJd: Tensor, lists: Lists, block: int, causal: bool, tiles: str
) -> tuple[Tensor, Tensor]:
    """(T, H, d), and fp32 (H, T): log2 of the sum of the exponentials of a query's scores."""
    (T, H, d), (N, J, K) = q_THd.shape, lists.target_NJK.shape
    out, lse_HT = torch.empty_like(q_THd), torch.empty(H, T, device=q_THd.device)
    if N and H and K:
        heads, tile = _cut("forward", tiles, q_THd, J, block)
        launch(
            _forward_kernel, (N * (H // J // heads), J),
            q_THd, k_TJd, v_TJd, *lists, out, lse_HT, T, H, J, K, d**-0.5 * LOG2_E,
            HEADS=heads, num_warps=tile.warps, num_stages=tile.stages,
            **_how(q_THd, lists, block, causal),
        )  # fmt: skip
    return out, lse_HT


class Kept(NamedTuple):
    """What the backward pass needs; all contiguous. grad_HT is of lse_HT."""

    grad_THd: Tensor
    grad_HT: Tensor
    q_THd: Tensor
    k_TJd: Tensor
    v_TJd: Tensor
    out_THd: Tensor
    lse_HT: Tensor


def grad_queries(
    kept: Kept, lists: Lists, block: int, causal: bool, tiles: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries and gates; and fp32 (H, T): gradient times output of each query, less
    what the log of its sum asks for."""
    q_THd = kept.q_THd
    (T, H, d), (N, J, K) = q_THd.shape, lists.target_NJK.shape
    heads, tile = _cut("queries", tiles, q_THd, max(J, 1), block)
    parts = H // max(J, 1) // heads
    grad_q, dot_HT = torch.empty_like(q_THd), torch.empty_like(kept.lse_HT)
    grad_gate = lists.gate_NJK.new_zeros(N, J, parts, K if lists.gate_NJK.numel() else 0)
    if N and H and K:
        launch(
            _queries_kernel, (N * parts, J),
            q_THd, kept.k_TJd, kept.v_TJd, *lists, kept.out_THd, kept.lse_HT, kept.grad_THd,
            kept.grad_HT, dot_HT, grad_q, grad_gate, T, H, J, K, d**-0.5 * LOG2_E,
            HEADS=heads, num_warps=tile.warps, num_stages=tile.stages,
            **_how(q_THd, lists, block, causal),
        )  # fmt: skip
    return grad_q, grad_gate.sum(2), dot_HT


def grad_keys(
    kept: Kept, dot_HT: Tensor, lists: Lists, groups: Groups, block: int, causal: bool, tiles: str
) -> tuple[Tensor, Tensor]:
    """Gradients of keys and values."""
    q_THd = kept.q_THd
    (T, H, d), (N, J, _) = q_THd.shape, lists.target_NJK.shape
    _, tile = _cut("keys", tiles, q_THd, max(J, 1), block)
    grads = torch.empty_like(kept.k_TJd), torch.empty_like(kept.v_TJd)
    if N and H:
        launch(
            _keys_kernel, (N, J),
            q_THd, kept.k_TJd, kept.v_TJd, lists.first_N, lists.last_N, *groups, kept.lse_HT,
            kept.grad_THd, dot_HT, *grads, T, H, J, d**-0.5 * LOG2_E,
            GROUP=H // J, num_warps=tile.warps, num_stages=tile.stages,
            **_how(q_THd, lists, block, causal),
        )  # fmt: skip
    return grads
