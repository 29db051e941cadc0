"""How many pairs does attention need for an output error of 0.1, or of 0.01, as texts get longer?

    python -m benchmarks.attention_error --data enwik8.xz --save

The error is the norm of the difference from dense attention's output over that output's norm, all
tokens and heads of a layer together. `random` are independent normal queries, keys and values;
`trained` those of each layer of a causal model of bytes, on held-out text. For each way of choosing
it is the least pairs that keep the error: `chosen` by the router's scores (own block, then the
best), `best blocks` by the attention that comes to them, which a router can only guess at, `window`
the last blocks, `best keys` each query's largest shares, one by one. A row's value is the exponent
e of pairs ~ n^e, by least squares over the lengths; dense attention has 2.
"""

import argparse
import math
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.attention_controls import make_model
from benchmarks.attention_learner import Learner
from benchmarks.attention_quality import Text
from benchmarks.results import Row, provenance, save
from moe_router.config import AttentionConfig
from moe_router.models.attend import attend_packed
from moe_router.models.attend_routed import Chosen, Executed, RoutedAttention
from moe_router.models.attention import Attention
from moe_router.models.packing import Packing

ERRORS = (0.1, 0.01)
WAYS = ("chosen", "best blocks", "window", "best keys")
SIZES = {"layers": 2, "dim": 128, "heads": 4, "kv_heads": 2, "hidden": 256}
HEADS, KV_HEADS, CHANNELS, VOCAB, ROWS, LR = 4, 2, 32, 256, 2, 2e-3
Tensors = tuple[Tensor, Tensor, Tensor]


class Layer:
    """Dense attention of one text, in parts by key block.

    Args:
        q_THC, k_TJC, v_TJC: as attention sees them.
        block: tokens of a block, a divisor of T.
    """

    def __init__(self, q_THC: Tensor, k_TJC: Tensor, v_TJC: Tensor, block: int) -> None:
        (T, H, C), J = q_THC.shape, k_TJC.size(1)
        assert T % block == 0
        self.block, self.blocks, self.heads, self.kv_heads = block, T // block, H, J
        self.q, self.k = q_THC.transpose(0, 1), k_TJC.transpose(0, 1)
        self.v = v_TJC.transpose(0, 1).repeat_interleave(H // J, 0)
        keys = self.k.repeat_interleave(H // J, 0)
        score_HTT = self.q @ keys.mT * C**-0.5
        self.causal_TT = torch.ones(T, T, dtype=torch.bool, device=score_HTT.device).tril()
        self.share_HTT = score_HTT.masked_fill(~self.causal_TT, -torch.inf).softmax(-1)
        parts_HTNS = self.share_HTT.view(H, T, self.blocks, block)
        self.mass_HTN = parts_HTNS.sum(-1)
        values = self.v.view(H, self.blocks, block, C)
        self.out_HTNC = torch.einsum("htns,hnsc->htnc", parts_HTNS, values)
        self.out_HTC = self.out_HTNC.sum(2)

    def rank(self, way: str) -> Tensor:
        """(J, N, N): which of a query block's key blocks is the first, the second, ..., by a way;
        its own is; later ones come last."""
        N, J = self.blocks, self.kv_heads
        if way == "window":
            score_JNN = torch.arange(N, device=self.q.device).float().expand(J, N, N)
        elif way == "chosen":
            C, G = self.q.size(2), self.heads // J
            first_JNC = self.q[:, :: self.block].reshape(J, G, N, C).mean(1)
            score_JNN = first_JNC @ self.k.reshape(J, N, self.block, C).mean(2).mT
        else:
            score_JNN = self.mass_HTN.reshape(J, -1, N, self.block, N).sum((1, 3))
        own = torch.eye(N, dtype=torch.bool, device=score_JNN.device)
        score_JNN = score_JNN.masked_fill(own, torch.inf)
        score_JNN = score_JNN.masked_fill(~torch.ones_like(own).tril(), -torch.inf)
        return score_JNN.argsort(dim=-1, descending=True, stable=True).argsort(-1)

    def error_of(self, mass: Tensor, out: Tensor) -> float:
        """Of what is left of the softmax, normalised again."""
        wrong = out / mass[..., None].clamp(min=1e-30) - self.out_HTC
        return float(wrong.norm() / self.out_HTC.norm())

    def by_blocks(self, rank_JNN: Tensor, top_k: int) -> tuple[float, int]:
        """Error, and pairs of one head, of the first top_k blocks."""
        seen_JNN = (rank_JNN < top_k).tril()
        seen_HTN = seen_JNN.repeat_interleave(self.heads // self.kv_heads, 0)
        seen_HTN = seen_HTN.repeat_interleave(self.block, 1)
        out = torch.einsum("htn,htnc->htc", seen_HTN.to(self.out_HTNC.dtype), self.out_HTNC)
        half = self.block * (self.block + 1) // 2
        whole = int(seen_JNN.sum()) / self.kv_heads - self.blocks
        pairs = round(whole * self.block**2 + self.blocks * half)
        return self.error_of((self.mass_HTN * seen_HTN).sum(-1), out), pairs

    def by_keys(self, least: float) -> tuple[float, int]:
        """Error, and pairs of one head, of the shares that are not below `least`, and the largest
        of each query."""
        top_HT1 = self.share_HTT.amax(-1, keepdim=True)
        seen = (self.share_HTT >= top_HT1.clamp(max=least)) & self.causal_TT
        share = self.share_HTT * seen
        return self.error_of(share.sum(-1), share @ self.v), int(seen.sum()) // self.heads

    def pairs_for(self, way: str, error: float) -> int:
        """The least pairs of a head for that error, found by halving."""
        if way == "best keys":
            low, high = -40.0, 0.0  # log of the least share: errors fall towards low
            for _ in range(16):
                middle = (low + high) / 2
                fits = self.by_keys(math.exp(middle))[0] <= error
                low, high = (middle, high) if fits else (low, middle)
            return self.by_keys(math.exp(low))[1]
        rank, few, many = self.rank(way), 1, self.blocks
        while few < many:
            middle = (few + many) // 2
            fits = self.by_blocks(rank, middle)[0] <= error
            few, many = (few, middle) if fits else (middle + 1, many)
        return self.by_blocks(rank, few)[1]


class _Listener(RoutedAttention):
    """Dense attention that keeps what came to it."""

    heard: Tensors

    def __call__(
        self, q_THC: Tensor, k_TJC: Tensor, v_TJC: Tensor, packing: Packing, step: int | None = None
    ) -> Chosen:
        self.heard = (q_THC.float(), k_TJC.float(), v_TJC.float())
        return Chosen(attend_packed(q_THC, k_TJC, v_TJC, packing), Executed(lambda: 0, 0))


def trained(text: Text, seed: int, steps: int, device: torch.device) -> list[Tensors]:
    """Queries, keys and values of each layer of a trained model, on each of a few held-out rows."""
    model = make_model("dense", SIZES, text.length, 1, 0, VOCAB, seed)
    learner = Learner(model, text.rows, text.length, lr=LR, device=device)
    generator = torch.Generator().manual_seed(seed)
    learner.train(lambda _: text.batch(generator), steps, 50)
    loss, _ = learner.held_out(2, text.held_out)
    print(f"trained, seed {seed}: {loss / math.log(2):.3f} bits per byte", flush=True)
    listeners = []
    for module in model.modules():
        if isinstance(module, Attention):
            module.routed = _Listener(AttentionConfig(kind="routed"))
            listeners.append(module.routed)
    learner.read(text.held_out(0))
    with torch.no_grad():
        learner.logits()
    found: list[Tensors] = []
    for listener in listeners:
        q, k, v = (torch.split(x, text.length) for x in listener.heard)
        found += zip(q, k, v, strict=True)
    return found


def random_tensors(tokens: int, seed: int, device: torch.device) -> list[Tensors]:
    generator = torch.Generator().manual_seed(seed)
    heads = (HEADS, KV_HEADS, KV_HEADS)
    q, k, v = (torch.randn(tokens, n, CHANNELS, generator=generator).to(device) for n in heads)
    return [(q, k, v)]


def exponent(lengths: list[int], pairs: list[float]) -> float:
    """Of pairs ~ n^e, by least squares of the logs."""
    return statistics.linear_regression([*map(math.log, lengths)], [*map(math.log, pairs)]).slope


def rows_of(
    source: str, lengths: list[int], block: int, tensors: Callable[[int], list[Tensors]], seeds: int
) -> Iterator[Row]:
    """Args:
    tensors: by seed, as long as the longest.
    """
    found: dict[tuple[str, float], list[list[float]]] = {}
    for seed in range(seeds):
        layers = tensors(seed)
        sums = {(way, error): [0.0] * len(lengths) for way in WAYS for error in ERRORS}
        for at, n in enumerate(lengths):
            for q, k, v in layers:
                layer = Layer(q[:n], k[:n], v[:n], block)
                for way, error in sums:
                    sums[way, error][at] += layer.pairs_for(way, error) / len(layers)
        for key, pairs in sums.items():
            found.setdefault(key, []).append(pairs)
    for (way, error), by_seed in found.items():
        each = [exponent(lengths, pairs) for pairs in by_seed]
        means = [statistics.mean(of) for of in zip(*by_seed, strict=True)]
        shares = [2 * p / (n * (n + 1)) for p, n in zip(means, lengths, strict=True)]
        yield {
            "name": f"error/{source}/{way}/{error}", "value": round(statistics.mean(each), 3),
            "unit": "exponent of n", "std": round(statistics.stdev(each), 3) if seeds > 1 else None,
            "seeds": [round(e, 3) for e in each], "lengths": lengths, "block": block,
            "pairs": [round(p) for p in means], "share": [round(s, 4) for s in shares],
        }  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="a text to train on; none: random tensors alone")
    parser.add_argument("--limit", type=int, default=20_000_000, help="bytes of it to read")
    parser.add_argument("--lengths", default="256,512,1024,2048", help="by commas")
    parser.add_argument("--block", type=int, default=16)
    parser.add_argument("--steps", type=int, default=200, help="of training")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args(arguments)
    lengths, device = [*map(int, args.lengths.split(","))], torch.device(args.device)
    origin = provenance(args.device)
    sources: dict[str, Callable[[int], list[Tensors]]] = {
        "random": lambda seed: random_tensors(lengths[-1], seed, device)
    }
    if args.data is not None:
        text = Text(args.data, args.limit, ROWS, lengths[-1])
        sources["trained"] = lambda seed: trained(text, seed, args.steps, device)
        origin["steps"] = args.steps
    for source, tensors in sources.items():
        for row in rows_of(source, lengths, args.block, tensors, args.seeds):
            print(f"{row['name']}: n^{row['value']} ({row['std']}), shares {row['share']}")
            if args.save:
                save("attention_error", [row | origin])


if __name__ == "__main__":
    main()
