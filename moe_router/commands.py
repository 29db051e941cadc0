"""What `eval` and `generate` do with a checkpoint, on one rank, whatever number wrote it."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from moe_router.config import Config
from moe_router.config_file import config_from_dict, config_to_dict, override
from moe_router.errors import ConfigError
from moe_router.models import Sampling, generate
from moe_router.observability.records import EvalRecord
from moe_router.training.checkpoint import read_about
from moe_router.training.data import load_dataset
from moe_router.training.evaluate import evaluate
from moe_router.training.inference import load_for_inference, load_model


def evaluate_step(step_dir: Path, overrides: Sequence[str], device: str) -> EvalRecord:
    """Held-out quality of a checkpoint.

    Args:
        overrides: "a.b=value" over the run's config: other data, more train.eval_rows.

    Raises:
        MoeRouterError: no checkpoint, no data, or an override of what the model is.
    """
    model, config, _ = load_model(step_dir, device)
    config = _changed(config, overrides, step_dir)
    step = read_about(step_dir)["step"]
    dataset = load_dataset(config.data)
    return evaluate(model, dataset, config, step, 0, 1, torch.device(device))


def _changed(config: Config, overrides: Sequence[str], step_dir: Path) -> Config:
    source = f"{step_dir}/state.json"
    changed = config_from_dict(override(config_to_dict(config), overrides, source), source)
    same_text = changed.data.tokenizer == config.data.tokenizer
    # labels in another order would count right answers as wrong
    if changed.model != config.model or not same_text or changed.data.labels != config.data.labels:
        raise ConfigError(
            f"{source}: --set {' '.join(overrides)}: the model and its tokenizer are those of the "
            "checkpoint, and so are data.labels; change the rest of data and train alone, or train "
            "another model"
        )
    return changed


def speak(step_dir: Path, asked: dict[str, Any], seed: int, device: str) -> str:
    """A prompt, and how a checkpoint goes on from it.

    Args:
        asked: keys of `serve` in the place of the run's; None leaves the run's.
        seed: names the draws.

    Raises:
        MoeRouterError: no checkpoint, or its model is not causal.
    """
    model, config, tokenizer = load_for_inference(step_dir, device)
    serve = replace(config.serve, **{k: v for k, v in asked.items() if v is not None})
    sampling = Sampling(
        max_new_tokens=serve.max_new_tokens,
        temperature=serve.temperature,
        top_k=serve.top_k,
        top_p=serve.top_p,
        seed=seed,
    )
    # a document starts with its separator: without it the prompt would look like a torn-off text
    prompt = [tokenizer.document_id, *tokenizer.encode(serve.prompt)]
    made = generate(model, [prompt], sampling, stop_id=tokenizer.document_id)[0]
    return tokenizer.decode([*prompt[1:], *made])
