"""The weights that a run begins with where the seed does not make them, and which of them learn."""

from pathlib import Path
from typing import Any

from torch import nn

from moe_router.config import Config, ModelConfig
from moe_router.config_file import config_from_dict
from moe_router.errors import ConfigError
from moe_router.integrations import layout
from moe_router.models import CausalLM, Classifier
from moe_router.training.checkpoint_files import STATE, latest_checkpoint, read_about
from moe_router.training.checkpoint_tensors import read_tensors, saved_names
from moe_router.training.optimizer import is_router
from moe_router.training.state import named_weights


def begin_from(model: CausalLM | Classifier, source: str) -> None:
    """Fill this rank's weights. Routers that the source does not have stay as they are.

    Args:
        source: a run, one of its steps, or a folder of a transformers model.

    Raises:
        ConfigError: it is neither, or its weights mean something else in this model.
        CheckpointError: damaged, or of another model.
    """
    path, weights = Path(source).expanduser(), named_weights(model)
    if (path / layout.CONFIG).is_file():
        _check_same(source, model.config, layout.from_hf(path)[0])
        layout.read_hf(path, model.config, weights)
        return
    step = path if (path / STATE).is_file() else latest_checkpoint(path)
    if step is None:
        raise ConfigError(
            f"train.init_from={source}: want a run with a checkpoint, one of its steps, or a "
            "folder of a transformers model"
        )
    saved = config_from_dict(read_about(step)["config"], str(step / STATE))
    _check_same(source, model.config, saved.model)
    new = {name for name in weights if is_router(name)} - saved_names(step)
    read_tensors(step, {name: tensor for name, tensor in weights.items() if name not in new})


def _check_same(source: str, config: ModelConfig, saved: ModelConfig) -> None:
    """What the shapes of tensors do not show, and their values depend on.

    Raises:
        ConfigError: it differs.
    """
    pairs: list[tuple[str, Any, Any, tuple[str, ...]]] = [
        ("model", config, saved, ("heads", "rope_theta", "norm_eps"))
    ]
    if config.moe is not None and saved.moe is not None:
        same = ("top_k", "score", "renormalise", "scale")
        pairs.append(("model.moe", config.moe, saved.moe, same))
    for where, ours, theirs, keys in pairs:
        for key in keys:
            value, wanted = getattr(ours, key), getattr(theirs, key)
            if value != wanted:
                raise ConfigError(
                    f"{where}.{key}={value}: train.init_from={source} was made with {wanted}; "
                    "want the same"
                )


def choose_learners(model: nn.Module, config: Config) -> None:
    """Freeze what `train.learn` leaves out. What is frozen already stays so.

    Raises:
        ConfigError: nothing is left that learns.
    """
    if config.train.learn == "routers":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and is_router(name))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(
            f"train.learn={config.train.learn}: nothing is left that learns: want all, or a model "
            "with model.moe or model.routing whose router is not frozen"
        )
