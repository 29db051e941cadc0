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
        dispatch_us: rank 0's dispatch and combine, forward, all layers; None without any.
        dispatch_bytes: hidden states that they brought to rank 0's experts.
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
    dispatch_us: float | None = None
    dispatch_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class EvalRecord:
    """Held-out quality after `step` steps.

    Attributes:
        loss: mean cross-entropy in nats, per token of text or per labelled document.
        tokens: that went in.
        bits_per_byte: of text: total nats / ln 2 / bytes; None of labelled documents.
        unigram_bits_per_byte: what knowing how often each token occurs would reach.
        accuracy: of labelled documents: the share that is right; None of text.
        matthews: their Matthews correlation.
        executed: FLOPs of the routed layers over those of the dense model, by the Ledger; None
            where nothing is routed.
    """

    step: int
    loss: float
    tokens: int
    bits_per_byte: float | None = None
    unigram_bits_per_byte: float | None = None
    accuracy: float | None = None
    matthews: float | None = None
    executed: float | None = None

    def __str__(self) -> str:
        return quality(self.bits_per_byte, self.unigram_bits_per_byte, self.accuracy, self.matthews)


def quality(
    bits: float | None, unigram: float | None, accuracy: float | None, correlation: float | None
) -> str:
    """Held-out quality in a few words."""
    if accuracy is not None:
        return f"{accuracy:.1%} of the labels right, Matthews correlation {correlation or 0:.3f}"
    if bits is None or not unigram:
        return "not evaluated"
    return f"{bits:.3f} bits per byte, {bits / unigram:.2f} of the unigram entropy {unigram:.3f}"
