"""The model of one rank: its experts, and its copy or shard of the rest."""

import os
from pathlib import Path

import torch

from moe_router.config import Config
from moe_router.dispatch import Dispatcher
from moe_router.models import (
    CausalLM,
    Classifier,
    ImageClassifier,
    TextClassifier,
    init_parameters,
)
from moe_router.models.backbone import Running
from moe_router.placement import Placement
from moe_router.training.begin import begin_from, choose_learners
from moe_router.training.data import AnyDataset, ImageDataset
from moe_router.training.parallel import shard_dense
from moe_router.training.rebalance import first_placement
from moe_router.training.transport import training_dispatcher


def repeat_bitwise(device: torch.device) -> None:
    """Have GPUs take the same sums in the same order every time; CPUs do."""
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        # unwritten memory is never read, so it needs no filling
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def new_model(
    config: Config, vocab: int, dispatcher: Dispatcher, placement: Placement | None = None
) -> CausalLM | Classifier:
    """What model.kind names, with weights that nobody has set yet."""
    running: Running = {
        "dispatcher": dispatcher,
        "placement": placement,
        "kernels": config.kernels,
        "activation_checkpointing": config.train.activation_checkpointing,
    }
    model, classes = config.model, len(config.data.labels)
    match model.kind:
        case "causal_lm":
            return CausalLM(model, vocab, **running)
        case "encoder":
            return TextClassifier(model, vocab, classes, **running)
        case "vit":
            assert config.data.image is not None  # the config is checked
            return ImageClassifier(model, config.data.image, classes, **running)


def build_model(
    config: Config,
    dataset: AnyDataset,
    *,
    ranks: int,
    device: torch.device,
    run_dir: Path | None = None,
) -> CausalLM | Classifier:
    """As initialised by the seed: ranks hold bit for bit the slices of the one-rank model.

    Args:
        dataset: that it is trained on.
        ranks: of the default process group, which must exist when there are several.
        run_dir: remembers the measured link.
    """
    dispatcher = training_dispatcher(config, ranks, device, run_dir)
    model = new_model(config, dataset.vocab, dispatcher, first_placement(config, ranks))
    init_parameters(model, config.run.seed)
    if isinstance(model, ImageClassifier):
        assert isinstance(dataset, ImageDataset)
        model.embed.normalise_by(dataset.mean, dataset.std)
    if config.train.init_from is not None:
        begin_from(model, config.train.init_from)
    choose_learners(model, config)
    model.to(device)
    if config.train.dense == "fsdp" and ranks > 1:
        shard_dense(model, ranks)
    return model
