"""The rows a run reports, as plain data: made by training, written by `metrics.py`, drawn by
`report.py`, sent between processes as they are."""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One committed optimizer step, summed over all ranks.

    Attributes:
        step: counts from 1.
        loss: mean cross-entropy, nats per token.
        losses: the routing losses, unscaled, mean over their routers and micro-steps.
        grad_norm: global L2 norm before clipping.
        lr: learning rate of the step.
        tokens: trained on in the step.
        seconds: wall-clock of the step on rank 0.
        load_LE: rows chosen for each expert, of each MoE layer, before drops.
        rows, dropped: choices that asked for a row; those that got none.
        executed_flops, dense_flops: of the routed layers, forward, from the Ledger.
    """

    step: int
    loss: float
    losses: dict[str, float]
    grad_norm: float
    lr: float
    tokens: int
    seconds: float
    load_LE: list[list[int]] = field(default_factory=list)
    rows: int = 0
    dropped: int = 0
    executed_flops: int = 0
    dense_flops: int = 0


@dataclass(frozen=True, slots=True)
class EvalRecord:
    """Held-out quality after `step` steps. Bits per byte: total nats / ln 2 / bytes."""

    step: int
    loss: float
    bits_per_byte: float
    unigram_bits_per_byte: float
    tokens: int
