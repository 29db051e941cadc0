"""Routing in depth: which tokens of each sequence a layer computes. A group is a sequence.

The experts' router chooses among groups; here a token has one group, its own sequence, and the
choice is whether it gets a row in it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe_router.config import RoutingConfig
from moe_router.routing.bounds import Bounds
from moe_router.routing.context import Context
from moe_router.routing.plan import plan_from_ids
from moe_router.routing.score import LinearScore, make_score
from moe_router.types import Choice, Plan, Tokens
from moe_router_kernels import combine, kept_op, reference, select_top_c

Count = TypeVar("Count", int, Tensor)

FINEST = 10**6  # of the shares that are kept, one part: times a length it fits int64


@dataclass(frozen=True, slots=True)
class Kept:
    """Some tokens of each sequence, in the order of the batch.

    Attributes:
        target_T1: int32, the sequence of a kept token, -1 for the others.
        plan: over B sequences; R is exactly the number of kept tokens, `offsets_G1` the next
            cu_seqlens.
        lengths: kept tokens of each sequence, on the host; none if `bounded`.
        expected: how many tokens the router keeps by its probabilities, to learn how many; None:
            that is not learned.
        bounded: R is a bound, and the host does not know how many there are; see `Bounds`.
    """

    target_T1: Tensor
    plan: Plan
    lengths: tuple[int, ...]
    expected: Tensor | None = None
    bounded: bool = False


class DepthRouter(nn.Module):
    """One fp32 logit per token: how much it needs what comes next.

    Args:
        dim: hidden size D.
        config: which function of the token, and whether it learns.
    """

    def __init__(self, dim: int, config: RoutingConfig) -> None:
        super().__init__()
        assert config.router != "attention"  # it has no score of its own
        self.score = make_score(dim, 1, config.router, config.router_hidden)
        self.bias = nn.Parameter(torch.zeros(1))
        self.requires_grad_(not config.frozen)

    def forward(self, x_TD: Tensor, position_T: Tensor) -> Tensor:
        """(T,) logits; x_TD is the residual stream, of any scale. What is between the two is made
        again in the backward pass: twice the stream in fp32 is a third of what a routed block that
        computes half of its tokens would keep."""
        if not torch.is_grad_enabled():
            if isinstance(self.score, LinearScore):
                return kept_op.rms_logit(x_TD, self.score.weight, self.bias)
            return self._logits(x_TD, position_T)
        logit_T: Tensor = checkpoint(
            self._logits, x_TD, position_T, use_reentrant=False, preserve_rng_state=False
        )
        return logit_T

    def _logits(self, x_TD: Tensor, position_T: Tensor) -> Tensor:
        with torch.autocast(x_TD.device.type, enabled=False):
            normed_TD = F.rms_norm(reference.wide(x_TD), (x_TD.size(-1),))
            logit_T1: Tensor = self.score(normed_TD, position_T)
            return logit_T1.squeeze(-1) + reference.wide(self.bias)


class Shifted(nn.Module):
    """A layer that chooses tokens by a logit, in evaluation as somebody asks.

    Attributes:
        shift: added to the logit in evaluation, for more tokens, or for fewer.
        soft: no token leaves in evaluation either; each weighs what its probabilities say.
    """

    config: RoutingConfig
    shift: float = 0.0
    soft: bool = False

    @property
    def lean(self) -> float:
        return 0.0 if self.training else self.shift

    def lean_of(self, tokens: Tokens, context: Context) -> Tensor | float:
        """`lean`, and what each token's own sequence asks for."""
        if self.training or context.shift_B is None:
            return self.lean
        sequence_T = reference.sequence_of(tokens.offsets_B1, tokens.position_T.numel())
        return self.lean + context.shift_B[sequence_T]

    def stays_soft(self, step: int | None) -> bool:
        """Whether nobody leaves: in the first training steps, or since somebody asks.

        Args:
            step: of training; None: it is over.
        """
        if self.training:
            return step is not None and step < self.config.soft_steps
        return self.soft


def flops_of(router: nn.Module, tokens: int) -> int:
    """Of the matrix products by which `router` decides for these tokens."""
    return 2 * tokens * sum(p.numel() for p in router.parameters() if p.dim() > 1)


@lru_cache(64)  # a curriculum asks for another one each step
def _share_of(keep: float) -> tuple[int, int]:
    """0.6 means 3/5: in floats, 0.6 of 5 tokens is rounded up to 4."""
    return Fraction(str(keep)).limit_denominator(FINEST).as_integer_ratio()


def part_of(keep: float, length: Count) -> Count:
    """A fraction `keep` of a length, rounded up; of an int, or of an int64 tensor of them."""
    of, parts = _share_of(keep)
    return -(-of * length // parts)


def keep_best(
    logit_T: Tensor, offsets_B1: Tensor, lengths: Sequence[int], keep: float, least: int = 0
) -> Kept:
    """The tokens of highest logit, a fraction `keep` of each sequence, rounded up.

    Args:
        lengths: of the sequences, on the host, so that nothing waits for the device.
        least: tokens of a sequence to keep, if it has so many.
    """
    # counted twice, here and on the device: a copy from here could not be part of a CUDA graph
    kept = [min(n, max(part_of(keep, n), least)) for n in lengths]
    count_B = count_best(offsets_B1.diff().long(), keep, least)
    return keep_counted(logit_T.detach(), offsets_B1, kept, count_B)


def count_best(length_B: Tensor, keep: float, least: int = 0) -> Tensor:
    """(B,) int64, how many of so many tokens `keep_best` keeps."""
    return torch.minimum(part_of(keep, length_B).clamp(min=least), length_B)


def keep_counted(logit_T: Tensor, offsets_B1: Tensor, kept: Sequence[int], count_B: Tensor) -> Kept:
    """So many tokens of each sequence, those of highest logit; of equal ones the earlier.

    Args:
        kept, count_B: how many, on the host and on the device.
    """
    taken_T1 = select_top_c(logit_T[:, None], offsets_B1, count_B)
    sequence_T = reference.sequence_of(offsets_B1, logit_T.numel())
    target_T1 = torch.where(taken_T1, sequence_T[:, None], -1).int()
    return _kept(target_T1, tuple(kept))


def keep_all(lengths: Sequence[int], offsets_B1: Tensor) -> Kept:
    """Every token."""
    sequence_T = reference.sequence_of(offsets_B1, sum(lengths))
    return Kept(sequence_T[:, None], every_token(sum(lengths), offsets_B1), tuple(lengths))


def keep_where(keep_T: Tensor, tokens: Tokens, bounds: Bounds | None = None) -> Kept:
    """The tokens where `keep_T` (bool) holds. Waits for the device: their number is a value; not
    with fixed bounds, which leave rows of no token behind the others."""
    offsets_B1 = tokens.offsets_B1
    sequence_T = reference.sequence_of(offsets_B1, keep_T.numel())
    target_T1 = torch.where(keep_T, sequence_T, -1).int()[:, None]
    if bounds is not None and bounds.fixed:
        sequences = offsets_B1.numel() - 1
        target_T1 = target_T1.masked_fill(target_T1 >= sequences, -1)  # rows of no token
        return Kept(target_T1, bounds.cut(plan_from_ids(target_T1, sequences)), (), bounded=True)
    count_B = reference.count(target_T1, offsets_B1.numel() - 1)
    kept = _kept(target_T1, tuple(count_B.tolist()))
    if bounds is not None:
        bounds.saw(kept.plan)
    return kept


def _kept(target_T1: Tensor, lengths: tuple[int, ...]) -> Kept:
    return Kept(target_T1, plan_from_ids(target_T1, len(lengths), rows=sum(lengths)), lengths)


def scatter(delta_RD: Tensor, choice: Choice, kept: Kept) -> Tensor:
    """(R, D) deltas of the kept tokens to (T, D): weight * delta, 0 for the others."""
    plan = kept.plan
    return combine(delta_RD, choice.weight_TK, plan.src_R, plan.choice_R, plan.row_TK)


def every_token(tokens: int, offsets_B1: Tensor) -> Plan:
    """The Plan in which each token has its row and none is moved."""
    row_T = torch.arange(tokens, dtype=torch.int32, device=offsets_B1.device)
    return Plan(row_T, row_T, offsets_B1, row_T[:, None])


def chain(plan: Plan, then: Plan) -> Plan:
    """Rows of rows: one Plan from the tokens of `plan` to the rows of `then`; one choice each."""
    src_R = plan.src_R[then.src_R]
    row_T1 = plan.row_TK
    if then.row_TK.numel():
        row_T1 = torch.where(row_T1 < 0, -1, then.row_TK[row_T1[:, 0].clamp(min=0)])
    return Plan(src_R, src_R, then.offsets_G1, row_T1)
