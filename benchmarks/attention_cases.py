"""What the attention benchmark runs: our routed attention, torch's dense ones, and the check of
ours against attention in fp32 over the keys that were chosen."""

import itertools
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from moe_router.config_attention import AttentionConfig
from moe_router.routing.blocks import BlockRouter, Blocks, Lists
from moe_router_kernels.attention_op import attend_blocks

DENSE = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
BOUND = {torch.bfloat16: 2e-2, torch.float32: 1e-4}


@dataclass(frozen=True)
class Shape:
    """B is 1.

    Attributes:
        kind: `share30`: the fewest blocks whose pairs are 30% of the causal ones; `top16`: 16.
    """

    kind: str
    tokens: int
    heads: int = 32
    kv_heads: int = 8
    channels: int = 128
    block: int = 64

    @cached_property
    def top_k(self) -> int:
        if self.kind.startswith("top"):
            return int(self.kind.removeprefix("top"))
        wanted = int(self.kind.removeprefix("share")) / 100 * self.dense_pairs
        return next(k for k in itertools.count(1) if self.pairs_of(k) >= wanted)

    def pairs_of(self, top_k: int) -> int:
        """Pairs of a query and a key that it sees, of one head."""
        whole, rest = divmod(self.tokens, self.block)
        sizes = [self.block] * whole + [rest] * (rest > 0)
        return sum(
            min(n, top_k - 1) * self.block * size + size * (size + 1) // 2
            for n, size in enumerate(sizes)
        )

    @property
    def pairs(self) -> int:
        return self.pairs_of(self.top_k)

    @property
    def dense_pairs(self) -> int:
        return self.tokens * (self.tokens + 1) // 2

    def flops(self, pairs: int) -> int:
        """Of the two products of a forward pass."""
        return 4 * self.heads * self.channels * pairs


class Case:
    """Queries, keys, values and a gradient of one shape, and everybody's attention to them."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(shape.tokens)
        self.shape = shape
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

        def draw(heads: int) -> Tensor:
            size = (shape.tokens, heads, shape.channels)
            return torch.randn(size, generator=generator, device=device).to(dtype)

        self.q, self.grad = draw(shape.heads), draw(shape.heads)
        self.k, self.v = draw(shape.kv_heads), draw(shape.kv_heads)
        self.leaves = [x.requires_grad_() for x in (self.q, self.k, self.v)]
        self._routers: dict[str, BlockRouter] = {}
        self.blocks = Blocks.of([shape.tokens], shape.block, device)

    def choose(self, kind: str) -> Lists:
        if kind not in self._routers:  # how many blocks it takes is counted, slowly, on the host
            top_k = replace(self.shape, kind=kind).top_k
            how = AttentionConfig(kind="routed", block=self.shape.block, top_k=top_k, window=0)
            self._routers[kind] = BlockRouter(how)
        return self._routers[kind].lists(self.q.detach(), self.k.detach(), self.blocks)

    def attend(self, chosen: Lists) -> Tensor:
        bounds, block = (self.blocks.first_N, self.blocks.last_N), self.shape.block
        here = (*bounds, chosen.target_NJK, block)
        return attend_blocks(self.q, self.k, self.v, *here, count_NJ2=chosen.count_NJ2)

    def ours(self, kind: str) -> Tensor:
        """Selection and attention."""
        return self.attend(self.choose(kind))

    def dense(self, name: str) -> Tensor:
        """torch's causal attention by one of its kernels, on the same tensors."""
        q, k, v = (x.transpose(0, 1)[None] for x in self.leaves)
        grouped = name != "efficient"  # which knows no grouped heads
        if not grouped:
            k, v = (x.repeat_interleave(q.size(1) // x.size(1), 1) for x in (k, v))
        with sdpa_kernel(DENSE[name]):
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        return y[0].transpose(0, 1)

    def backward(self, out_THd: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out_THd, self.leaves, self.grad)

    def error(self, kind: str, *, gradients: bool) -> float:
        """The largest relative error of the output, and of the gradients, at some query blocks and
        key blocks, against fp32 attention to the chosen keys."""
        chosen = self.choose(kind)
        out, target_NJK = self.attend(chosen), chosen.target_NJK
        grads = self.backward(out) if gradients else None
        N, J = target_NJK.shape[:2]
        units = [Unit(self, n, j, target_NJK) for n in {0, N // 3, N - 1} for j in {0, J - 1}]
        errors = [relative(unit.part(out.detach()), unit.out) for unit in units]
        if grads is not None:
            errors += [relative(unit.part(grads[0]), unit.grad_q) for unit in units]
            # a key block far back is chosen by many: those of short texts alone are quickly checked
            late = {N - 1, max(N - 2, 0)} | ({0, N // 3} if N <= 64 else set())
            errors += [
                self._error_of_keys(m, j, target_NJK, grads) for m in late for j in {0, J - 1}
            ]
        return max(errors)

    def _error_of_keys(
        self, m: int, j: int, target_NJK: Tensor, grads: tuple[Tensor, ...]
    ) -> float:
        first, last = int(self.blocks.first_N[m]), int(self.blocks.last_N[m])
        wanted = torch.zeros(2, last - first, self.shape.channels, device=self.q.device)
        for n in (target_NJK[:, j] == m).any(-1).nonzero()[:, 0].tolist():
            unit = Unit(self, n, j, target_NJK)
            inside = (unit.key_S >= first) & (unit.key_S < last)
            wanted += torch.stack([unit.grad_k, unit.grad_v])[:, inside]
        pairs = zip(grads[1:], wanted, strict=True)
        return max(relative(got[first:last, j], want) for got, want in pairs)


class Unit:
    """fp32 attention of one query block to the keys that it chose for one KV head, by definition.

    Attributes:
        key_S: the tokens that are its keys.
        out, grad_q: of the heads that share the KV head.
        grad_k, grad_v: what it adds to those of its keys.
    """

    def __init__(self, case: Case, n: int, j: int, target_NJK: Tensor) -> None:
        first, last = case.blocks.first_N.tolist(), case.blocks.last_N.tolist()
        device, group = case.q.device, case.shape.heads // case.shape.kv_heads
        chosen = [m for m in target_NJK[n, j].tolist() if m >= 0]
        keys = [torch.arange(first[m], last[m], device=device) for m in chosen]
        token, self.key_S = torch.arange(first[n], last[n], device=device), torch.cat(keys)
        self._at = slice(first[n], last[n]), slice(j * group, (j + 1) * group)
        parts = (self.part(case.q), case.k[self.key_S, j], case.v[self.key_S, j])
        q, k, v = (x.detach().float().requires_grad_() for x in parts)
        score = torch.einsum("qhd,kd->hqk", q, k) * q.size(-1) ** -0.5
        score = score.masked_fill(self.key_S > token[:, None], float("-inf"))
        out = torch.einsum("hqk,kd->qhd", score.softmax(-1), v)
        grads = torch.autograd.grad(out, (q, k, v), self.part(case.grad).float())
        self.out, (self.grad_q, self.grad_k, self.grad_v) = out.detach(), grads

    def part(self, x_THd: Tensor) -> Tensor:
        """The tokens and heads of this unit."""
        tokens, heads = self._at
        return x_THd[tokens, heads]


def relative(got: Tensor, wanted: Tensor) -> float:
    return float((got.float() - wanted).norm() / wanted.norm())
