"""At inference, how much a checkpoint may compute: one shift of all its routers in depth, found on
training data so that the executed FLOPs are the share that was asked for.

A shift moves each token's logit alone, so what was causal stays causal. Prune by rank and merging
have no threshold to move: rank shifts its share of survivors, merging cannot be asked.
"""

import torch

from moe_router.config import Config
from moe_router.errors import ConfigError
from moe_router.models import CausalLM, Classifier
from moe_router.routing import Context, Ledger
from moe_router.training.data import AnyDataset, Batch, load_dataset, train_batch

FAR = 64.0  # a shift beyond every logit: its executed shares are the floor and the ceiling
HALVINGS = 16


def calibrate(
    model: CausalLM | Classifier, dataset: AnyDataset, config: Config, budget: float
) -> float:
    """Have the model execute a share of the dense model's FLOPs: as little as it can (0), as much
    as it can (1), or between the two in a straight line.

    Args:
        model: in eval mode; its routers are shifted.
        dataset: what it was trained on; held-out data plays no part.
        budget: in hundredths, to which others are rounded.

    Returns:
        The share that it executes of that data now.

    Raises:
        ConfigError: a model without routers that could be asked, or another budget.
    """
    budget = in_hundredths(budget)
    require_askable(config, budget)
    batch = _batch(model, dataset, config)
    return _executed(model, batch, _find(model, batch, budget))


class Shifts:
    """The shifts of one model by compute budget, for who gives each sequence its own.

    Args:
        model: in eval mode; several ranks ask together, and find the same.
        config: of its run.
    """

    def __init__(self, model: CausalLM, config: Config) -> None:
        self._model, self._config = model, config
        self._batch: Batch | None = None

    def prepare(self, budget: float) -> None:
        """Read the data that it takes, once; other ranks are not needed.

        Raises:
            ConfigError: as `calibrate`.
            DataError: the training data is not here.
        """
        require_askable(self._config, budget)
        if self._batch is None:
            self._batch = _batch(self._model, load_dataset(self._config.data), self._config)

    def find(self, budget: float) -> float:
        """What `calibrate` shifts the routers by; they stay as they are."""
        assert self._batch is not None
        try:
            return _find(self._model, self._batch, budget)
        finally:
            self._model.shift_routers(0.0)


def in_hundredths(budget: float) -> float:
    """Raises ConfigError: it is no share."""
    if not 0 <= budget <= 1:
        raise ConfigError(f"compute budget {budget}: want 0, the least, to 1, the most")
    return round(budget, 2)


def require_askable(config: Config, budget: float) -> None:
    """Raises ConfigError: a model without routers that could be asked."""
    if config.model.routing is None or config.model.routing.kind == "merge":
        raise ConfigError(
            f"compute budget {budget}: want a model whose tokens skip, halt, leap or are pruned "
            "(model.routing.kind)"
        )


def _batch(model: CausalLM | Classifier, dataset: AnyDataset, config: Config) -> Batch:
    return train_batch(
        dataset, batch=config.train.batch, step=0, micro=0, accumulation=1, rank=0, ranks=1,
        seed=config.run.seed,
    ).to(model.norm.weight.device)  # fmt: skip


def _find(model: CausalLM | Classifier, batch: Batch, budget: float) -> float:
    low, high = -FAR, FAR
    floor, ceiling = (_executed(model, batch, shift) for shift in (low, high))
    wanted = floor + budget * (ceiling - floor)
    for _ in range(HALVINGS if 0 < budget < 1 else 0):
        middle = (low + high) / 2
        low, high = (middle, high) if _executed(model, batch, middle) < wanted else (low, middle)
    return low if budget == 0 else high


@torch.no_grad()
def _executed(model: CausalLM | Classifier, batch: Batch, shift: float) -> float:
    model.shift_routers(shift)
    ledger = Ledger()
    model(batch.ids_T, batch.position_T, batch.offsets_B1, context=Context(ledger=ledger))
    # every rank reads the same batch; who computes an expert's rows counts them
    here = torch.tensor(ledger.totals(), dtype=torch.float64, device=batch.ids_T.device)
    executed, dense = model.dispatcher.total(here).tolist()
    return float(executed / dense)
