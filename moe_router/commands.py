"""What commands do with a checkpoint, on one rank, whatever number wrote it."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from moe_router.config import Config
from moe_router.config_file import config_from_dict, config_to_dict, override
from moe_router.errors import ConfigError
from moe_router.integrations import layout
from moe_router.models import CausalLM, Sampling, generate
from moe_router.observability.records import EvalRecord
from moe_router.training.calibrate import calibrate
from moe_router.training.checkpoint import CheckpointWriter, read_about
from moe_router.training.data import load_dataset, load_tokenizer
from moe_router.training.evaluate import evaluate
from moe_router.training.inference import load_for_inference, load_model
from moe_router.training.state import named_weights


def evaluate_step(
    step_dir: Path,
    overrides: Sequence[str],
    device: str,
    compute_budget: float | None = None,
    soft: bool = False,
) -> EvalRecord:
    """Held-out quality of a checkpoint.

    Args:
        overrides: "a.b=value" over the run's config: other data, more train.eval_rows.
        compute_budget: from the least that its routers can compute (0) to the most (1); None: as
            trained.
        soft: no token halts or is pruned by a threshold; it weighs what its router says.

    Raises:
        MoeRouterError: no checkpoint, no data, an override of what the model is, or soft where no
            training is.
    """
    model, config, _ = load_model(step_dir, device)
    config = _changed(config, overrides, step_dir)
    if soft:
        _require_softened(config)
    step = read_about(step_dir)["step"]
    dataset = load_dataset(config.data)
    if compute_budget is not None:
        calibrate(model, dataset, config, compute_budget)
    model.soften_routers(soft)
    return evaluate(model, dataset, config, step, 0, 1, torch.device(device))


def _require_softened(config: Config) -> None:
    routing = config.model.routing
    if routing is None or not routing.softens:
        raise ConfigError(
            "--soft: want a model whose training can be soft: halt by ponder or tsa, leap or prune "
            "(model.routing)"
        )


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


def speak(
    step_dir: Path,
    asked: dict[str, Any],
    seed: int,
    device: str,
    compute_budget: float | None = None,
) -> str:
    """A prompt, and how a checkpoint goes on from it.

    Args:
        asked: keys of `serve` in the place of the run's; None leaves the run's.
        seed: names the draws.
        compute_budget: as in `evaluate_step`.

    Raises:
        MoeRouterError: no checkpoint, or its model is not causal.
    """
    model, config, tokenizer = load_for_inference(step_dir, device)
    if compute_budget is not None:
        calibrate(model, load_dataset(config.data), config, compute_budget)
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


def export(step_dir: Path, folder: Path) -> str:
    """Write a checkpoint as a folder that transformers reads.

    Returns:
        What kind of model transformers takes it for.

    Raises:
        MoeRouterError: no checkpoint, transformers has no such model, or a folder that is taken.
    """
    model, config, tokenizer = load_for_inference(step_dir)
    weights = named_weights(model)
    layout.write_hf(folder, model, weights, tokenizer.document_id, config.data.tokenizer)
    return "Mixtral" if config.model.moe else "Llama"


def import_model(folder: Path, base: Config) -> tuple[Path, int]:
    """Make a run of a Llama or Mixtral of transformers: what it is comes from its folder.

    Args:
        base: everything else, the run's name with it.

    Returns:
        The checkpoint, which can be served, evaluated, and begun with; and how many ids of theirs
        the tokenizer does not have, whose embeddings are left out.

    Raises:
        MoeRouterError: another kind of model, a damaged one, or a run that is there already.
    """
    found, vocab = layout.from_hf(folder)
    file = folder / layout.TOKENIZER
    spec = str(file.absolute()) if file.is_file() else "bytes"
    tokenizer = load_tokenizer(spec)
    if tokenizer.vocab > vocab:
        raise ConfigError(
            f"{folder}: {vocab} embeddings for the {tokenizer.vocab} ids of {spec}; want its "
            f"{layout.TOKENIZER} beside it"
        )
    config = replace(base, model=found, data=replace(base.data, tokenizer=spec))
    run = Path(config.run.dir) / config.run.name
    if run.exists():
        raise ConfigError(f"{run}: is there already; want another --name")
    model = CausalLM(found, tokenizer.vocab)
    weights = named_weights(model)
    layout.read_hf(folder, found, weights)
    run.mkdir(parents=True)
    CheckpointWriter(0, 1, config).save(run, 0, weights, wait=True)
    return run / "step_0", vocab - tokenizer.vocab
