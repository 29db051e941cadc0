"""One micro-step of a rank: its rows of the batch, and what names its noise."""

from dataclasses import dataclass
from typing import Self

import torch

from moe_router.config import Config
from moe_router.training.data import AnyDataset, Batch, train_batch
from moe_router.types import NoiseKey


@dataclass(frozen=True, slots=True)
class Micro:
    """Attributes:
    batch: on the device.
    """

    batch: Batch
    key: NoiseKey

    @classmethod
    def of(
        cls,
        config: Config,
        dataset: AnyDataset,
        *,
        step: int,
        index: int,
        rank: int,
        ranks: int,
        device: torch.device,
    ) -> Self:
        """Args:
        step: optimizer steps committed.
        index: of the micro-step in its step.
        """
        accumulation = config.train.accumulation
        batch = train_batch(
            dataset,
            batch=config.train.batch,
            step=step,
            micro=index,
            accumulation=accumulation,
            rank=rank,
            ranks=ranks,
            seed=config.run.seed,
        )
        number = step * accumulation + index
        return cls(batch.to(device), NoiseKey(config.run.seed, number, batch.first_token))
