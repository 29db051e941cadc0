"""Held-out quality over all ranks: bits per byte of text, or how many labels are right."""

import math
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from moe_router.config import Config
from moe_router.models import CausalLM, Classifier
from moe_router.models.causal_lm import token_loss
from moe_router.observability.records import EvalRecord
from moe_router.routing import Context, Ledger
from moe_router.training.data import AnyDataset, Batch, Dataset, val_batches


@torch.no_grad()
def evaluate(
    model: CausalLM | Classifier,
    dataset: AnyDataset,
    config: Config,
    step: int,
    rank: int,
    ranks: int,
    device: torch.device,
) -> EvalRecord:
    """The first train.eval_rows held-out rows, documents or images, each once.

    Returns:
        EvalRecord, identical on all ranks.

    Raises:
        DataError: fewer held-out rows than ranks.
    """
    train = config.train
    model.eval()
    sums = torch.zeros(0, dtype=torch.float64, device=device)
    rows, ledger = train.batch // train.accumulation, Ledger()
    for batch in val_batches(dataset, rows=train.eval_rows, batch=rows, rank=rank, ranks=ranks):
        batch = batch.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=train.precision == "bf16"):
            here = (batch.ids_T, batch.position_T, batch.offsets_B1)
            output = model(*here, context=Context(ledger=ledger))
        measured = _measure(output.logits, batch, dataset)
        sums = measured if sums.numel() == 0 else sums + measured
    flops = torch.tensor(ledger.totals(), dtype=torch.float64, device=device)
    if ranks > 1:
        dist.all_reduce(sums)
        dist.all_reduce(flops)
    executed, dense = flops.tolist()
    record = (
        _of_text(sums, dataset, step) if isinstance(dataset, Dataset) else _of_labels(sums, step)
    )
    return replace(record, executed=executed / dense if dense else None)


def _measure(logits_NV: Tensor, batch: Batch, dataset: AnyDataset) -> Tensor:
    """fp64 sums over this rank's part: nats, targets, tokens, then bytes or the confusion."""
    target_N = batch.target_N
    nats = token_loss(logits_NV, target_N).double()
    counts = [
        nats,
        *(torch.full_like(nats, n) for n in (target_N.numel(), batch.position_T.numel())),
    ]
    if not isinstance(dataset, Dataset):
        C = len(dataset.labels)
        pair_N = target_N * C + logits_NV.argmax(-1)
        return torch.cat([torch.stack(counts), torch.bincount(pair_N, minlength=C * C).double()])
    bytes_V = torch.as_tensor(dataset.tokenizer.bytes_of).to(target_N.device)
    return torch.stack([*counts, bytes_V[target_N].sum().double()])


def _of_text(sums: Tensor, dataset: Dataset, step: int) -> EvalRecord:
    nats, targets, tokens, byte_count = sums.tolist()
    return EvalRecord(
        step=step,
        loss=nats / targets,
        tokens=int(tokens),
        bits_per_byte=nats / math.log(2) / max(byte_count, 1),
        unigram_bits_per_byte=dataset.unigram_bits_per_byte,
    )


def _of_labels(sums: Tensor, step: int) -> EvalRecord:
    nats, targets, tokens = sums[:3].tolist()
    C = math.isqrt(sums.numel() - 3)
    confusion_CC = sums[3:].view(C, C)  # true label by predicted label
    return EvalRecord(
        step=step,
        loss=nats / targets,
        tokens=int(tokens),
        accuracy=float(confusion_CC.trace() / targets),
        matthews=matthews(confusion_CC),
    )


def matthews(confusion_CC: Tensor) -> float:
    """Matthews correlation in [-1, 1]; 0 where one side has a single label.

    Args:
        confusion_CC: fp64 counts, true label by predicted label.

    Source: Gorodkin 2004, "Comparing two K-category assignments by a K-category correlation
    coefficient".
    """
    true_C, guessed_C, n = confusion_CC.sum(1), confusion_CC.sum(0), confusion_CC.sum()
    covariance = confusion_CC.trace() * n - true_C @ guessed_C
    spread = (n * n - true_C @ true_C) * (n * n - guessed_C @ guessed_C)
    return float(covariance / spread.sqrt()) if spread > 0 else 0.0
