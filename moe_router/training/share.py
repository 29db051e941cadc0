"""What a trainer tells the gating service: where experts are, and how its routers decide."""

from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from moe_router.gating_records import RouterWeights
from moe_router.models import CausalLM, Classifier
from moe_router.training.loop import Trainer
from moe_router.training.parallel import moe_layers


def agreed(trainer: Trainer, *, epoch: int, step: int) -> dict[str, Any]:
    """The arguments of `GatingService.publish`; call it on all ranks, for FSDP2 splits routers.

    Args:
        epoch: that begins.
        step: the checkpointed step from which it holds.
    """
    return facts(trainer.model, trainer.config.run.name, epoch=epoch, step=step)


def facts(model: CausalLM | Classifier, name: str, *, epoch: int, step: int) -> dict[str, Any]:
    """The same for a model without a trainer.

    Args:
        name: of the model, by which `Route` finds its routers.
    """
    moes = moe_layers(model)
    return {
        "epoch": epoch,
        "step": step,
        "placements": [moe.placement for moe in moes],
        "capacity_factor": moes[0].config.capacity_factor if moes else None,
        "routers": [
            RouterWeights.of(name, moe.dim, moe.router, _whole(moe.router.state_dict()))
            for moe in moes
        ],
    }


def _whole(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: x.full_tensor() if isinstance(x, DTensor) else x for n, x in state.items()}
