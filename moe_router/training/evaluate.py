"""Held-out quality: nats per token and bits per byte, over all ranks."""

import math

import torch
import torch.distributed as dist

from moe_router.config import Config
from moe_router.models import CausalLM
from moe_router.models.causal_lm import token_loss
from moe_router.observability.records import EvalRecord
from moe_router.training.data import Dataset, val_batches


@torch.no_grad()
def evaluate(
    model: CausalLM,
    dataset: Dataset,
    config: Config,
    step: int,
    rank: int,
    ranks: int,
    device: torch.device,
) -> EvalRecord:
    """The first train.eval_rows held-out rows, each once.

    Returns:
        EvalRecord, identical on all ranks.

    Raises:
        DataError: fewer held-out rows than ranks.
    """
    train = config.train
    bytes_V = torch.as_tensor(dataset.tokenizer.bytes_of).to(device)
    sums = torch.zeros(3, dtype=torch.float64, device=device)  # nats, bytes, tokens
    model.eval()
    rows = train.batch // train.accumulation
    batches = val_batches(dataset, rows=train.eval_rows, batch=rows, rank=rank, ranks=ranks)
    for batch in batches:
        batch = batch.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=train.precision == "bf16"):
            output = model(batch.ids_T, batch.position_T, batch.offsets_B1)
        nats = token_loss(output.logits_TV, batch.target_T).double()
        count = bytes_V[batch.target_T].sum()
        sums += torch.stack([nats, count, torch.full_like(nats, batch.target_T.numel())])
    if ranks > 1:
        dist.all_reduce(sums)
    nats_total, byte_count, tokens = sums.tolist()
    return EvalRecord(
        step=step,
        loss=nats_total / tokens,
        bits_per_byte=nats_total / math.log(2) / max(byte_count, 1),
        unigram_bits_per_byte=dataset.unigram_bits_per_byte,
        tokens=int(tokens),
    )
