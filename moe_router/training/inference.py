"""A trained model on one rank, from a checkpoint of any number of ranks."""

from pathlib import Path

import torch

from moe_router.config import Config
from moe_router.config_file import config_from_dict
from moe_router.dispatch import AllToAll, Dispatcher, Local
from moe_router.models import CausalLM
from moe_router.training.checkpoint_files import STATE, read_about
from moe_router.training.checkpoint_tensors import read_tensors
from moe_router.training.data import Tokenizer, load_tokenizer
from moe_router.training.state import named_weights


def load_for_inference(
    step_dir: Path, device: torch.device | str = "cpu", *, ranks: int = 1
) -> tuple[CausalLM, Config, Tokenizer]:
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
    dispatcher: Dispatcher = AllToAll() if ranks > 1 else Local()
    model = CausalLM(config.model, tokenizer.vocab, dispatcher=dispatcher, kernels=config.kernels)
    model.to(device).eval()
    read_tensors(step_dir, named_weights(model))
    return model, config, tokenizer
