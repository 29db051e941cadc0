"""A trained model on one rank, from a checkpoint of any number of ranks."""

from pathlib import Path

import torch

from moe_router.config import Config
from moe_router.config_file import config_from_dict
from moe_router.models import CausalLM
from moe_router.training.checkpoint import read_about, restore
from moe_router.training.data import Tokenizer, load_tokenizer
from moe_router.training.state import named_weights


def load_for_inference(
    step_dir: Path, device: torch.device | str = "cpu"
) -> tuple[CausalLM, Config, Tokenizer]:
    """Read weights alone, all experts here.

    Returns:
        The model in eval mode, the config of its run, and its tokenizer.

    Raises:
        CheckpointError: not a whole checkpoint.
    """
    about = read_about(step_dir)
    config = config_from_dict(about["config"], str(step_dir / "state.json"))
    tokenizer = load_tokenizer(config.data.tokenizer)
    model = CausalLM(config.model, tokenizer.vocab, kernels=config.kernels).to(device).eval()
    restore(step_dir, named_weights(model), rank=1, ranks=1)
    return model, config, tokenizer
