"""A trained model on one rank, from a checkpoint of any number of ranks."""

from pathlib import Path

import torch

from moe_router.config import Config
from moe_router.config_file import config_from_dict
from moe_router.dispatch import AllToAll, Local
from moe_router.errors import NotCausalError
from moe_router.models import CausalLM, Classifier
from moe_router.training.build import new_model
from moe_router.training.checkpoint_files import STATE, read_about
from moe_router.training.checkpoint_tensors import read_tensors
from moe_router.training.data import Tokenizer, load_tokenizer
from moe_router.training.state import named_weights


def load_model(
    step_dir: Path, device: torch.device | str = "cpu", *, ranks: int = 1
) -> tuple[CausalLM | Classifier, Config, Tokenizer]:
    """Read the weights alone.

    Args:
        ranks: of the default process group, which must exist when there are several: this one
            then holds its part of the experts. 1: all experts are here.

    Returns:
        The model in eval mode, the config of its run, and its tokenizer.

    Raises:
        CheckpointError: damaged, foreign, or not what its own config describes.
        DataError: the tokenizer's file is gone.
    """
    about = read_about(step_dir)
    config = config_from_dict(about["config"], str(step_dir / STATE))
    tokenizer = load_tokenizer(config.data.tokenizer)
    model = new_model(config, tokenizer.vocab, AllToAll() if ranks > 1 else Local())
    model.to(device).eval()
    read_tensors(step_dir, named_weights(model))
    return model, config, tokenizer


def load_for_inference(
    step_dir: Path, device: torch.device | str = "cpu", *, ranks: int = 1
) -> tuple[CausalLM, Config, Tokenizer]:
    """`load_model`, of a model that makes text.

    Raises:
        NotCausalError: it is a classifier.
    """
    model, config, tokenizer = load_model(step_dir, device, ranks=ranks)
    if not isinstance(model, CausalLM):
        raise NotCausalError(
            f"{step_dir}: model.kind={config.model.kind} gives labels and no text, want a run "
            "of a causal_lm; ask this one with `moe-router eval`"
        )
    return model, config, tokenizer
