"""The model of one rank: its experts, and its copy or shard of the rest."""

import os

import torch

from moe_router.config import Config
from moe_router.dispatch import AllToAll, Bounded, Dispatcher, GatherScatter, Local, Padded
from moe_router.models import (
    CausalLM,
    Classifier,
    ImageClassifier,
    TextClassifier,
    init_parameters,
)
from moe_router.models.backbone import Running
from moe_router.training.data import AnyDataset, ImageDataset
from moe_router.training.parallel import shard_dense


def repeat_bitwise(device: torch.device) -> None:
    """Have GPUs take the same sums in the same order every time; CPUs do."""
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        # unwritten memory is never read, so it needs no filling
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def new_model(config: Config, vocab: int, dispatcher: Dispatcher) -> CausalLM | Classifier:
    """What model.kind names, with weights that nobody has set yet."""
    running: Running = {
        "dispatcher": dispatcher,
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


def training_dispatcher(config: Config, ranks: int) -> Dispatcher:
    """How the tokens of a training step reach the experts."""
    if ranks == 1:
        return Local()
    exact = AllToAll()
    rows = config.train.batch // config.train.accumulation // ranks
    bounds = (rows * config.data.seq_len, config.cluster.row_bound)
    match config.cluster.transport:
        case "all_to_all":
            return exact
        case "padded":
            return Bounded(Padded(*bounds), exact)
        case "gather_scatter":
            return Bounded(GatherScatter(*bounds), exact)


def build_model(
    config: Config, dataset: AnyDataset, *, ranks: int, device: torch.device
) -> CausalLM | Classifier:
    """As initialised by the seed: ranks hold bit for bit the slices of the one-rank model.

    Args:
        dataset: that it is trained on.
        ranks: of the default process group, which must exist when there are several.
    """
    model = new_model(config, dataset.vocab, training_dispatcher(config, ranks))
    init_parameters(model, config.run.seed)
    if isinstance(model, ImageClassifier):
        assert isinstance(dataset, ImageDataset)
        model.embed.normalise_by(dataset.mean, dataset.std)
    model.to(device)
    if config.train.dense == "fsdp" and ranks > 1:
        shard_dense(model, ranks)
    return model
