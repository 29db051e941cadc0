"""The same model in transformers, trained on one rank on the same rows, beside our loop.

Equal sizes and equally many parameters, random weights, AdamW over the same groups, the same
balance loss. What differs: it sees a row as one document, so its attention needs no mask, and its
`grouped_mm` computes in the dtype that the weights are kept in, autocast or not. So it runs twice:
with weights, gradients and moments in fp32 as ours, and with all of them in bf16.
"""

import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_router.config import Config
from moe_router.config_file import config_from_dict
from moe_router.cost import cost
from moe_router.integrations.layout import to_hf
from moe_router.training.data import load_dataset, load_tokenizer, train_batch
from moe_router.training.optimizer import clip, learning_rate, make_optimizer, set_rate, square_sum

EXPERTS = "grouped_mm"
WEIGHTS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def name_of(weights: str) -> str:
    return f"transformers {EXPERTS}, {weights} weights"


def measure_peer(
    device: torch.device, config: dict[str, Any], steps: int, warm_up: int, weights: str
) -> dict[str, Any]:
    """Seconds of each step after the first ones, and the last loss, as of ours."""
    read = config_from_dict(config)
    model = make_model(read, device, WEIGHTS[weights])
    optimizer = make_optimizer(model, read.train)
    dataset = load_dataset(read.data)
    seconds, loss = [], 0.0
    for step in range(warm_up + steps):
        began = time.perf_counter()
        loss = _step(model, optimizer, dataset, read, step, device)
        seconds.append(time.perf_counter() - began)
    return {
        "seconds": seconds[warm_up:], "tokens": read.train.batch * read.data.seq_len,
        "loss": loss, "repeated": 0, "peak_bytes": peak_bytes(device),
    }  # fmt: skip


def peak_bytes(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def make_model(config: Config, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Of as many parameters as ours.

    Raises:
        ConfigError: transformers has no such model.
    """
    import transformers

    vocab = load_tokenizer(config.data.tokenizer).vocab
    said = to_hf(config.model, vocab, None)
    moe = config.model.moe
    if moe is not None:
        said |= {"output_router_logits": True, "router_aux_loss_coef": moe.balance_loss}
    about = transformers.AutoConfig.for_model(**said, attn_implementation="sdpa")
    torch.manual_seed(config.run.seed)
    auto: Any = transformers.AutoModelForCausalLM
    with device:
        model: Any = auto.from_config(about, dtype=dtype)
    model.set_experts_implementation(EXPERTS)
    held, ours = sum(p.numel() for p in model.parameters()), cost(config, vocab).parameters
    if held != ours:
        raise ValueError(f"transformers' model has {held} parameters, ours {ours}")
    made: nn.Module = model.train()
    return made


def _step(
    model: nn.Module,
    optimizer: torch.optim.AdamW,
    dataset: Any,
    config: Config,
    step: int,
    device: torch.device,
) -> float:
    train = config.train
    cross_entropy = torch.zeros((), device=device)
    for micro in range(train.accumulation):
        batch = train_batch(
            dataset, batch=train.batch, step=step, micro=micro, accumulation=train.accumulation,
            rank=0, ranks=1, seed=config.run.seed,
        ).to(device)  # fmt: skip
        loss, own = _loss(model, batch.ids_T, batch.target_N, config, device)
        (loss / train.accumulation).backward()  # type: ignore[no-untyped-call]
        cross_entropy += own.detach() / train.accumulation
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    norm = float(square_sum(grads, device).sqrt())  # the host waits here, as our loop does
    clip(grads, norm, train.clip_norm)
    set_rate(optimizer, learning_rate(step, train))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(cross_entropy)


def _loss(
    model: nn.Module, ids_T: Tensor, target_N: Tensor, config: Config, device: torch.device
) -> tuple[Tensor, Tensor]:
    """With the balance loss, and without."""
    bf16 = config.train.precision == "bf16"
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        out: Any = model(ids_T.view(-1, config.data.seq_len), use_cache=False)
    own = F.cross_entropy(out.logits.flatten(0, 1).float(), target_N)
    aux = getattr(out, "aux_loss", None)  # of a model with experts
    return own if aux is None else own + config.model.moe.balance_loss * aux, own  # type: ignore[union-attr]
