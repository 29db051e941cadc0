"""What a model routed in depth executes, token by token."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.depth_speed import Model
from moe_router import Context, Ledger
from moe_router.config import Config
from moe_router.training.data import Batch
from moe_router.types import Choice, Plan
from moe_router_kernels import reference


@dataclass(frozen=True, slots=True)
class Executed:
    """FLOPs of the blocks, per token that came in.

    Attributes:
        percentiles: p5, p50, p95 of what was executed for a token.
        mean: of all tokens, routers included.
        dense: if every token took every block.
        router: of the mean, what decided.
    """

    percentiles: tuple[float, float, float]
    mean: float
    dense: float
    router: float


@torch.no_grad()
def executed(model: Model, config: Config, batches: list[Batch]) -> Executed:
    """Who ran is observed, block by block; what it costs is checked against the Ledger.

    Only for models without experts.
    """
    model.eval()
    each: list[Tensor] = []
    ledger = Ledger()
    for batch in batches:
        ran: dict[int, Tensor] = {}
        context = Context(ledger=ledger, observe=_note(ran))
        model(batch.ids_T, batch.position_T, batch.offsets_B1, context=context)
        each.append(_flops_of_tokens(config, batch.offsets_B1, ran))
    flops_T = torch.cat(each)
    by_op = ledger.by_op()
    counted = sum(by_op[op][0] for op in ("attention", "mlp") if op in by_op)
    if config.model.routing is not None and counted != int(flops_T.sum()):
        raise AssertionError(f"the Ledger counts {counted}, tokens come to {int(flops_T.sum())}")
    router = by_op.get("router", (0, 0))[0] / flops_T.numel()
    p5, p50, p95 = torch.quantile(flops_T.double(), torch.tensor([0.05, 0.5, 0.95]).double())
    mean, dense = float(flops_T.double().mean()), dense_flops(config, batches)
    return Executed((float(p5), float(p50), float(p95)), mean + router, dense, router)


def dense_flops(config: Config, batches: list[Batch]) -> float:
    """Of the blocks, per token, if every token takes every block."""
    each = [_flops_of_tokens(config, batch.offsets_B1, {}) for batch in batches]
    return float(torch.cat(each).double().mean())


def _note(ran: dict[int, Tensor]) -> Callable[[int, Choice, Plan], None]:
    def observe(layer: int, choice: Choice, plan: Plan) -> None:
        assert layer not in ran
        ran[layer] = choice.target_TK[:, 0] >= 0

    return observe


def _flops_of_tokens(config: Config, offsets_B1: Tensor, ran: dict[int, Tensor]) -> Tensor:
    """(T,) int64, on the host. `ran` says which tokens the feed-forward of a block computed; not in
    it: all."""
    offsets_B1 = offsets_B1.cpu()
    model, T = config.model, int(offsets_B1[-1])
    sequence_T = reference.sequence_of(offsets_B1, T)
    all_T = torch.ones(T, dtype=torch.bool)
    merges = bool(ran) and model.routing is not None and model.routing.kind == "merge"
    D, width, kv_width = (model.dim, *(model.channels * n for n in (model.heads, model.kv_heads)))
    flops_T = torch.zeros(T, dtype=torch.int64)
    before_T = all_T
    for layer in range(model.steps):
        fed_T = ran[layer].cpu() if layer in ran else all_T
        # tokens merge between attention and feed-forward; else both compute the same ones
        attended_T = before_T if merges else fed_T
        # of its sequence, or of that up to the token itself
        before_T1 = F.pad(attended_T.long().cumsum(0), (1, 0))
        start_B, end_B = before_T1[offsets_B1[:-1].long()], before_T1[offsets_B1[1:].long()]
        causal = model.kind == "causal_lm"
        seen_T = (before_T1[1:] if causal else end_B[sequence_T]) - start_B[sequence_T]
        attention_T = 2 * (2 * D * width + 2 * D * kv_width) + 4 * width * seen_T
        flops_T += attended_T * attention_T + fed_T * (6 * D * model.hidden)
        before_T = fed_T
    return flops_T
