"""What flows through a routed model. One shape legend for the whole project:

    T tokens   B sequences   D hidden   F expert hidden   E experts   G groups
    K choices per token   R routed rows   N received tokens   W ranks   V vocabulary

Tensors end in their shape: `x_TD` is (T, D); `offsets_G1` is (G + 1,).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

Out = Literal["token", "row", "group"]
Total = Callable[[Tensor], Tensor]
"""Sum a tensor over all ranks, without gradient. On one rank: `same`."""


def same(x: Tensor) -> Tensor:
    """The sum over one rank."""
    return x


@dataclass(frozen=True, slots=True)
class Tokens:
    """What flows between layers: packed sequences, no padding.

    Attributes:
        x_TD: hidden states.
        position_T: int32, position inside its sequence.
        offsets_B1: int32, sequence b is tokens offsets[b] : offsets[b + 1] (cu_seqlens).
        size_T: fp32, how many merged tokens each one stands for; None means one each.
    """

    x_TD: Tensor
    position_T: Tensor
    offsets_B1: Tensor
    size_T: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """Where rows go: integers only, no gradient, cheap to send.

    Attributes:
        src_R: int32, the token gathered into each row; sorted by group, token order inside a
            group; rows past offsets_G1[G] are -1.
        choice_R: int32, t * K + k of the choice that made the row; -1 past the end.
        offsets_G1: int32, rows of group g are offsets[g] : offsets[g + 1].
        row_TK: int32, the inverse: row of choice (t, k); -1 is dropped or not routed.
        out: what the combined result is indexed by.
    """

    src_R: Tensor
    choice_R: Tensor
    offsets_G1: Tensor
    row_TK: Tensor
    out: Out = "token"

    @property
    def rows_G(self) -> Tensor:
        """int32, rows of each group."""
        return self.offsets_G1.diff()


@dataclass(frozen=True, slots=True)
class Choice:
    """What the router decided; gradients flow through `weight_TK` and `losses`.

    Attributes:
        target_TK: int32, the group of each choice; -1 is no choice.
        weight_TK: fp32, 0 where there is no choice.
        losses: named, unscaled; this rank's share of a sum over all ranks.
        plan: the dropless Plan, where the kernel that decided made it too.
        real: fp32 scalar, the share of the choices that the scores expect to be no null experts,
            with its gradient; None: all.
    """

    target_TK: Tensor
    weight_TK: Tensor
    losses: dict[str, Tensor] = field(default_factory=dict)
    plan: Plan | None = None
    real: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Routed:
    """What a routed layer returns. The block adds `delta_TD` to the residual, once.

    Attributes:
        overflow: scalar, not 0: rows were lost, nothing of this pass may be used; None: none can
            be. To be read after the backward pass.
    """

    delta_TD: Tensor
    choice: Choice
    plan: Plan
    overflow: Tensor | None = None


@dataclass(frozen=True, slots=True)
class HaltState:
    """How far each token of a pass has come towards halting. Source: docs/routing.md.

    Attributes:
        plan: the tokens that still go on: their rows, R of them exactly, by sequence.
        cumulative_T: fp32, sum of the halting probabilities so far; 1 once halted.
        remainder_T: fp32, what was left to 1 when the token halted; 0 before.
        steps_T: int32, routed steps that computed the token.
        divergence_T: fp32, of the halting probabilities so far from a geometric prior.
        output_TD: what comes out of the token; whole once it has halted.
    """

    plan: Plan
    cumulative_T: Tensor
    remainder_T: Tensor
    steps_T: Tensor
    divergence_T: Tensor
    output_TD: Tensor


@dataclass(frozen=True, slots=True)
class NoiseKey:
    """Names a draw of noise, so that it is the same for any number of ranks and after a resume.

    Attributes:
        seed, step: of the run; `step` counts micro-steps.
        first_token: global index of this rank's first token in the batch.
    """

    seed: int = 0
    step: int = 0
    first_token: int = 0


Observe = Callable[[int, Choice, Plan], None]
"""Called by a routed layer with its index, after it has planned: the recorder and the metrics."""
